"""The graphs of an optimum folder beside the backbone, as torch modules to export, with their inputs and outputs.

The contract is that of optimum-onnx 0.1.0 (`optimum/onnxruntime/modeling_diffusion.py`): names are looked up by string,
every input must be one that the pipeline feeds, and a dimension of an output is a name of an input's, or arithmetic
on such names with spaces between, which optimum evaluates to size its buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffc.errors import DiffcError, UnsupportedError
from diffc.models.sources.backbone import DTYPES, quiet_libraries
from diffc.models.sources.components import component_variant
from diffc.models.sources.json_files import read_json

Dims = tuple[str | int, ...]
_MOST_IMAGES = 63  # from batch 64 on, diffusers' Upsample2D takes another path, which one graph cannot hold


@dataclass(frozen=True)
class Graph:
    """A graph to export: `module` takes `feed` (one tensor) and gives `outputs`, by name with their dimensions.

    `dims` are the dimensions of the feed: an int is fixed, a name is dynamic with a size of at most `most[name]`, and
    "8 * height" is a multiple of a dynamic one. `config` is the content of config.json beside the graph.
    """

    name: str
    module: nn.Module
    feed: tuple[str, Tensor]
    dims: Dims
    outputs: Mapping[str, Dims]
    most: Mapping[str, int]
    config: Mapping[str, Any]


class _Call(nn.Module):
    """A function of a module and a tensor, as a module: torch exports modules only."""

    def __init__(self, owner: nn.Module, call: Callable[[Any, Tensor], Any]):
        super().__init__()
        self.owner, self.call = owner, call

    def forward(self, x: Tensor) -> Any:
        """The result of the function."""
        return self.call(self.owner, x)


def component_graphs(
    pipeline: Path, name: str, kind: str, dtype: str, variant: str | None = None
) -> list[Graph]:
    """The graphs of one component of a pipeline folder: one of a text encoder, two of a VAE.

    `kind` is the component's class as model_index.json has it, `dtype` that of weights, inputs and outputs. Files of
    `variant` are read where the component has any, plain ones otherwise. A VAE
    whose config.json says `force_upcast` overflows in float16 and is float32 whatever `dtype` is.
    Raises UnsupportedError for a class that the optimum layout has no place for.
    """
    makers: dict[str, Callable[[Path, str, str, str, str | None], list[Graph]]] = {
        "CLIPTextModel": _clip,
        "CLIPTextModelWithProjection": _clip,
        "T5EncoderModel": _t5,
        "AutoencoderKL": _vae,
    }
    if kind not in makers:
        raise UnsupportedError(
            f"{pipeline / name} is a {kind}; the optimum layout has graphs of {', '.join(makers)}",
            fix="leave --layout out, or package another pipeline",
        )
    with quiet_libraries():
        found = component_variant(pipeline / name, variant)
        return makers[kind](pipeline / name, name, kind, dtype, found)


def _clip(folder: Path, name: str, kind: str, dtype: str, variant: str | None) -> list[Graph]:
    encoder, config = _text_encoder(folder, kind, dtype, variant)
    length = config["max_position_embeddings"]
    first = ("last_hidden_state", "pooler_output")
    if kind == "CLIPTextModelWithProjection":
        first = ("text_embeds", "last_hidden_state")
    width, states = config["hidden_size"], config["num_hidden_layers"] + 1
    sizes = {"last_hidden_state": ("batch", "text", width), "pooler_output": ("batch", width)}
    sizes |= {"text_embeds": ("batch", config.get("projection_dim", width))}
    outputs: dict[str, Dims] = {key: sizes[key] for key in first}
    outputs |= {f"hidden_states.{i}": ("batch", "text", width) for i in range(states)}

    def call(model: Any, ids: Tensor) -> tuple[Tensor, ...]:
        given = model(input_ids=ids, output_hidden_states=True)
        return (*(given[key] for key in first), *given.hidden_states)

    ids = _ids(config["vocab_size"], min(length, 20))
    most = {"text": length}
    return [Graph(name, _Call(encoder, call), ("input_ids", ids), ("batch", "text"), outputs, most, config)]


def _t5(folder: Path, name: str, kind: str, dtype: str, variant: str | None) -> list[Graph]:
    encoder, config = _text_encoder(folder, kind, dtype, variant)
    config.setdefault("num_decoder_layers", config["num_layers"])  # optimum reads it of every text encoder
    outputs: dict[str, Dims] = {"last_hidden_state": ("batch", "text", config["d_model"])}

    def call(model: Any, ids: Tensor) -> Tensor:
        states: Tensor = model(input_ids=ids).last_hidden_state
        return states

    ids = _ids(config["vocab_size"], 20)
    return [Graph(name, _Call(encoder, call), ("input_ids", ids), ("batch", "text"), outputs, {}, config)]


def _vae(folder: Path, name: str, kind: str, dtype: str, variant: str | None) -> list[Graph]:
    import diffusers

    config = _config(folder)
    dtype = "float32" if config.get("force_upcast", True) else dtype
    load = getattr(diffusers, kind).from_pretrained
    vae = load(folder, torch_dtype=DTYPES[dtype], variant=variant, use_safetensors=True).eval()
    scale = 2 ** (len(config["block_out_channels"]) - 1)
    latent, pixels = int(config["latent_channels"]), int(config["in_channels"])
    image: Dims = ("batch", pixels, f"{scale} * height", f"{scale} * width")
    most = {"batch": _MOST_IMAGES}
    encode = Graph(
        f"{name}_encoder",
        _Call(vae, lambda model, x: model._encode(x)),
        ("sample", _noise(2, pixels, 4 * scale, 6 * scale, dtype=dtype)),
        image,
        {"latent_parameters": ("batch", 2 * latent, "height", "width")},
        most,
        config,
    )
    decode = Graph(
        f"{name}_decoder",
        _Call(vae, lambda model, z: model.decode(z, return_dict=False)[0]),
        ("latent_sample", _noise(2, latent, 4, 6, dtype=dtype)),
        ("batch", latent, "height", "width"),
        {"sample": image},
        most,
        config,
    )
    return [encode, decode]


def _text_encoder(
    folder: Path, kind: str, dtype: str, variant: str | None
) -> tuple[nn.Module, dict[str, Any]]:
    import transformers

    load = getattr(transformers, kind).from_pretrained
    try:
        model = load(
            folder, dtype=DTYPES[dtype], variant=variant, use_safetensors=True, local_files_only=True
        )
    except MemoryError:
        raise
    except Exception as error:  # transformers and safetensors raise what a damaged file leads them to
        said = f"{type(error).__name__}: {str(error)[:1000]}"
        raise DiffcError(
            f"transformers cannot load {folder}: {said}", fix="download the pipeline completely"
        ) from error
    return model.eval(), _config(folder)


def _config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json")


def _ids(vocabulary: int, length: int) -> Tensor:
    """Random tokens [2, length], int64, the last of each row the vocabulary's last (CLIP's end of text)."""
    ids = torch.randint(0, vocabulary - 1, (2, length), generator=torch.Generator().manual_seed(0))
    ids[0, -1], ids[1, length // 2 :] = vocabulary - 1, vocabulary - 1
    return ids


def _noise(*shape: int, dtype: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
