"""Names of diffusers -> those of the original release, which ComfyUI reads: the way back of diffusers' converters.

A tensor of the release is one of diffusers', or several joined by rows; `swapped` exchanges its two halves, since
the releases say shift before scale in their last modulation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Original:
    """The tensors of diffusers, by name, that one of the release is made of, in the order of its rows."""

    parts: tuple[str, ...]
    swapped: bool = False


Table = dict[str, Original]


def original_names(kind: str, names: Collection[str]) -> Table | None:
    """What each tensor of the release is made of, for a backbone of the diffusers class `kind` with these tensors.

    None for a class whose names the release shares, or whose way back is not known.
    """
    make = _MAKERS.get(kind)
    return None if make is None else make(frozenset(names))


def has_way_back(kind: str) -> bool:
    """Whether the names of the release can be given for a class."""
    return kind in _MAKERS


class _Rules:
    """Collects the tensors of a release; those that diffusers' backbone does not have are left out."""

    def __init__(self, names: frozenset[str]):
        self.names, self.table = names, Table()

    def layer(self, source: str, target: str, *more: str, swapped: bool = False) -> None:
        """Weight and bias of a layer, or of several joined."""
        for leaf in ("weight", "bias"):
            parts = tuple(f"{name}.{leaf}" for name in (source, *more))
            if all(part in self.names for part in parts):
                self.table[f"{target}.{leaf}"] = Original(parts, swapped)

    def tensor(self, source: str, target: str) -> None:
        """A tensor that has another name."""
        if source in self.names:
            self.table[target] = Original((source,))

    def count(self, name: str) -> int:
        found = (re.match(rf"{name}\.(\d+)\.", key) for key in self.names)
        return max((int(m[1]) for m in found if m), default=-1) + 1


def _flux(names: frozenset[str]) -> Table:
    rules = _Rules(names)
    embedders = {
        "timestep_embedder": "time_in",
        "text_embedder": "vector_in",
        "guidance_embedder": "guidance_in",
    }
    for source, target in embedders.items():
        rules.layer(f"time_text_embed.{source}.linear_1", f"{target}.in_layer")
        rules.layer(f"time_text_embed.{source}.linear_2", f"{target}.out_layer")
    rules.layer("context_embedder", "txt_in")
    rules.layer("x_embedder", "img_in")
    rules.layer("proj_out", "final_layer.linear")
    rules.layer("norm_out.linear", "final_layer.adaLN_modulation.1", swapped=True)
    for i in range(rules.count("transformer_blocks")):
        _flux_double(rules, f"transformer_blocks.{i}.", f"double_blocks.{i}.")
    for i in range(rules.count("single_transformer_blocks")):
        source, target = f"single_transformer_blocks.{i}.", f"single_blocks.{i}."
        joined = [f"{source}{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
        rules.layer(f"{source}norm.linear", f"{target}modulation.lin")
        rules.layer(f"{source}proj_out", f"{target}linear2")
        rules.layer(joined[0], f"{target}linear1", *joined[1:])
        rules.tensor(f"{source}attn.norm_q.weight", f"{target}norm.query_norm.scale")
        rules.tensor(f"{source}attn.norm_k.weight", f"{target}norm.key_norm.scale")
    return rules.table


_STREAMS = (
    ("img", "norm1", ("to_q", "to_k", "to_v"), "to_out.0", "norm_q", "norm_k", "ff"),
    (
        "txt",
        "norm1_context",
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        "to_add_out",
        "norm_added_q",
        "norm_added_k",
        "ff_context",
    ),
)


def _flux_double(rules: _Rules, source: str, target: str) -> None:
    for stream, norm, (q, k, v), out, norm_q, norm_k, ff in _STREAMS:
        own = f"{target}{stream}"
        rules.layer(f"{source}{norm}.linear", f"{own}_mod.lin")
        rules.layer(f"{source}attn.{q}", f"{own}_attn.qkv", f"{source}attn.{k}", f"{source}attn.{v}")
        rules.layer(f"{source}attn.{out}", f"{own}_attn.proj")
        rules.layer(f"{source}{ff}.net.0.proj", f"{own}_mlp.0")
        rules.layer(f"{source}{ff}.net.2", f"{own}_mlp.2")
        rules.tensor(f"{source}attn.{norm_q}.weight", f"{own}_attn.norm.query_norm.scale")
        rules.tensor(f"{source}attn.{norm_k}.weight", f"{own}_attn.norm.key_norm.scale")


def _sd3(names: frozenset[str]) -> Table:
    rules = _Rules(names)
    rules.tensor("pos_embed.pos_embed", "pos_embed")
    rules.layer("pos_embed.proj", "x_embedder.proj")
    for source, target in {"timestep_embedder": "t_embedder", "text_embedder": "y_embedder"}.items():
        rules.layer(f"time_text_embed.{source}.linear_1", f"{target}.mlp.0")
        rules.layer(f"time_text_embed.{source}.linear_2", f"{target}.mlp.2")
    rules.layer("context_embedder", "context_embedder")
    rules.layer("proj_out", "final_layer.linear")
    rules.layer("norm_out.linear", "final_layer.adaLN_modulation.1", swapped=True)
    layers = rules.count("transformer_blocks")
    for i in range(layers):
        _sd3_block(rules, f"transformer_blocks.{i}.", f"joint_blocks.{i}.", last=i == layers - 1)
    return rules.table


def _sd3_block(rules: _Rules, source: str, target: str, *, last: bool) -> None:
    for (_, norm, (q, k, v), out, norm_q, norm_k, ff), own in zip(
        _STREAMS, ("x_block", "context_block"), strict=True
    ):
        own = f"{target}{own}."
        rules.layer(
            f"{source}{norm}.linear", f"{own}adaLN_modulation.1", swapped=last and norm == "norm1_context"
        )
        rules.layer(f"{source}attn.{q}", f"{own}attn.qkv", f"{source}attn.{k}", f"{source}attn.{v}")
        rules.layer(f"{source}attn.{out}", f"{own}attn.proj")
        rules.tensor(f"{source}attn.{norm_q}.weight", f"{own}attn.ln_q.weight")
        rules.tensor(f"{source}attn.{norm_k}.weight", f"{own}attn.ln_k.weight")
        rules.layer(f"{source}{ff}.net.0.proj", f"{own}mlp.fc1")
        rules.layer(f"{source}{ff}.net.2", f"{own}mlp.fc2")
    own, second = f"{target}x_block.attn2.", f"{source}attn2."
    rules.layer(f"{second}to_q", f"{own}qkv", f"{second}to_k", f"{second}to_v")
    rules.layer(f"{second}to_out.0", f"{own}proj")
    rules.tensor(f"{second}norm_q.weight", f"{own}ln_q.weight")
    rules.tensor(f"{second}norm_k.weight", f"{own}ln_k.weight")


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def _unet(names: frozenset[str]) -> Table:
    layers = _Rules(names).count(r"down_blocks\.0\.resnets")
    renamed = {name: _unet_name(name, layers, names) for name in sorted(names)}
    return {target: Original((source,)) for source, target in renamed.items() if target}


def _unet_name(name: str, layers: int, names: Collection[str]) -> str:
    """The release's name of one tensor of a UNet whose levels have `layers` residual blocks; empty for no tensor."""
    module, _, leaf = name.rpartition(".")
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.{leaf}"
    if m := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name):
        place = 1 + 2 * int(m[2]) if m[1] == "attentions" else 2 * int(m[2])
        return f"middle_block.{place}.{_inside(m[1], m[3])}"
    if m := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", name):
        index = int(m[2]) * (layers + 1) + int(m[4])
        block = f"input_blocks.{index + 1}" if m[1] == "down" else f"output_blocks.{index}"
        return f"{block}.{int(m[3] == 'attentions')}.{_inside(m[3], m[5])}"
    if m := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.*)", name):
        return f"input_blocks.{(int(m[1]) + 1) * (layers + 1)}.0.op.{m[2]}"
    if m := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.*)", name):
        attends = any(key.startswith(f"up_blocks.{m[1]}.attentions.") for key in names)
        return f"output_blocks.{int(m[1]) * (layers + 1) + layers}.{2 if attends else 1}.conv.{m[2]}"
    return ""


def _inside(kind: str, name: str) -> str:
    if kind == "attentions":
        return name
    module, _, leaf = name.partition(".")
    return f"{_RESNET[module]}.{leaf}"


_MAKERS: Mapping[str, Callable[[frozenset[str]], Table]] = {
    "FluxTransformer2DModel": _flux,
    "SD3Transformer2DModel": _sd3,
    "UNet2DConditionModel": _unet,
}
