"""The options of quantization: what is refused, and which layers and quantizers each of them changes."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
from diffusers.models.attention import FeedForward
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffc.errors import DiffcError, UnsupportedError
from diffc.models.embedded import tiny
from diffc.models.registry import FAMILIES
from diffc.quantize.calibrate import algorithm_of
from diffc.quantize.convert import enabled_quantizers, insert_quantizers, layer_of, role_of
from diffc.quantize.formats import FORMATS
from diffc.quantize.options import COLLECT_METHODS, DEFAULT_OPTIONS, LEVELS, QuantOptions

BACKBONES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sd3": (diffusers.SD3Transformer2DModel, tiny.SD35),
    "flux": (diffusers.FluxTransformer2DModel, tiny.FLUX),
    "sdxl": (diffusers.UNet2DConditionModel, tiny.SDXL),
}


NARROW = {"block_out_channels": (64, 96, 128), "attention_head_dim": (1, 4, 2)}
"""A UNet with linear layers of 96 channels, in heads of 24."""


def backbone_of(family: str, **changed: Any) -> nn.Module:
    cls, config = BACKBONES[family]
    with FakeTensorMode():
        made: nn.Module = cls(**(config | changed))
    return made


def quantized(backbone: nn.Module) -> set[str]:
    """Paths of the layers whose weights are quantized."""
    return {layer_of(n) for n in enabled_quantizers(backbone) if role_of(n) == "weight_quantizer"}


@pytest.mark.parametrize("name", FORMATS)
def test_the_defaults_suit_every_format(name: str) -> None:
    DEFAULT_OPTIONS.check(FORMATS[name])


@pytest.mark.parametrize(
    ("changed", "format", "message"),
    [
        ({"level": 2.2}, "int8", r"unknown quant level '2\.2'\. Known: 1, 2, 2\.5, 3, 4"),
        (
            {"collect_method": "max"},
            "int8",
            r"unknown collect method 'max'\. Known: default, global_min, min-max",
        ),
        ({"weight_scales": "mse"}, "nvfp4", r"unknown choice of weight scales 'mse'\. Known: max, four-six"),
        ({"alpha": 1.5}, "int8_smoothquant", r"--alpha is 1\.5[\s\S]*0 to 1"),
        ({"alpha": -0.1}, "int8_smoothquant", r"--alpha is -0\.1"),
        ({"percentile": 2.0}, "int8", r"--percentile is 2[\s\S]*0 to 1"),
        ({"lowrank": 0}, "nvfp4_svdquant", r"--lowrank is 0[\s\S]*1 to 4096"),
        ({"lowrank": 5000}, "nvfp4_svdquant", r"--lowrank is 5000"),
        ({"collect_method": "min-mean", "percentile": 0.0}, "int8", r"--percentile 0 takes no step"),
    ],
)
def test_values_out_of_range_are_refused(changed: dict[str, Any], format: str, message: str) -> None:
    with pytest.raises(DiffcError, match=message):
        QuantOptions(**changed).check(FORMATS[format])


USERS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "--alpha": ({"alpha": 0.5}, {"int8_smoothquant"}),
    "--percentile": ({"percentile": 0.5}, {"int8", "int8_smoothquant"}),
    "--collect-method": ({"collect_method": "min-mean"}, {"int8", "int8_smoothquant"}),
    "--lowrank": ({"lowrank": 8}, {"nvfp4_svdquant"}),
    "--block-size": ({"block_size": 64}, {"int4_awq", "w4a8_awq"}),
    "--awq": ({"awq": "full"}, {"int4_awq", "w4a8_awq"}),
    "--weight-scales": ({"weight_scales": "four-six"}, {"nvfp4", "nvfp4_svdquant"}),
}


@pytest.mark.parametrize("option", USERS)
@pytest.mark.parametrize("name", FORMATS)
def test_options_that_a_format_has_no_use_for_are_refused(option: str, name: str) -> None:
    changed, users = USERS[option]
    if name in users:
        QuantOptions(**changed).check(FORMATS[name])
        return
    with pytest.raises(UnsupportedError, match=f"{option} has no meaning for format '{name}'") as raised:
        QuantOptions(**changed).check(FORMATS[name])
    assert all(user in str(raised.value) for user in users)


@pytest.mark.parametrize("changed", [{"mha": True}, {"level": 4.0}])
@pytest.mark.parametrize("name", FORMATS)
def test_attention_runs_beside_some_formats(changed: dict[str, Any], name: str) -> None:
    if name in ("fp8", "nvfp4", "nvfp4_svdquant"):
        QuantOptions(**changed).check(FORMATS[name])
        return
    with pytest.raises(
        UnsupportedError, match=f"attention runs in FP8 beside fp8, nvfp4, nvfp4_svdquant; .*{name}"
    ):
        QuantOptions(**changed).check(FORMATS[name])


@pytest.mark.parametrize("size", [16, 48, 256])
def test_blocks_without_kernels_are_refused(size: int) -> None:
    with pytest.raises(
        UnsupportedError, match=rf"no kernels for int4_awq in blocks of {size}[\s\S]*32, 64, 128"
    ):
        QuantOptions(block_size=size).check(FORMATS["int4_awq"])


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8", "int4_awq"])
def test_a_format_s_own_block_size_may_be_said(name: str) -> None:
    options = QuantOptions(block_size=FORMATS[name].block_size)
    options.check(FORMATS[name])
    assert options.quantizers(FORMATS[name]) == DEFAULT_OPTIONS.quantizers(FORMATS[name])


@pytest.mark.parametrize("format", ["int4_awq", "w4a8_awq"])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_block_sizes_reach_the_quantizers_and_decide_what_fits(format: str, size: int) -> None:
    backbone = backbone_of("sdxl", **NARROW)
    wide = {n: m.in_features for n, m in backbone.named_modules() if isinstance(m, nn.Linear)}
    insert_quantizers(backbone, FORMATS[format], FAMILIES["sdxl"].unquantized, QuantOptions(block_size=size))
    for name, quantizer in enabled_quantizers(backbone).items():
        first = name.endswith(("weight_quantizer", "weight_quantizer.0"))
        assert (quantizer.block_sizes or {}).get(-1) == (size if first else None)
    found = quantized(backbone)
    assert {wide[name] % size for name in found} == {0}
    assert (96 in {wide[name] for name in found}) == (size == 32)


def expected_layers(family: str, backbone: nn.Module, level: float) -> set[str]:
    """What a level quantizes, from the classes of modules rather than from their paths."""
    import re

    modules = dict(backbone.named_modules())
    found = set()
    for name, module in modules.items():
        if not isinstance(module, nn.Linear | nn.Conv2d) or re.match(FAMILIES[family].unquantized, name):
            continue
        above = [modules[name.rsplit(".", i)[0]] for i in range(1, name.count(".") + 1)]
        leaf = name.rpartition(".")[2]
        feeds = any(isinstance(m, FeedForward) for m in above) or leaf == "proj_mlp"
        projects = "Attention" in type(above[0] if above else module).__name__ and leaf in (
            *("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"),
        )
        wanted = isinstance(module, nn.Conv2d) or level >= 3
        if wanted or (level >= 2 and feeds) or (level >= 2.5 and projects):
            found.add(name)
    return found


@pytest.mark.parametrize("family", BACKBONES)
@pytest.mark.parametrize("level", LEVELS)
def test_levels_choose_layers(family: str, level: float) -> None:
    backbone = backbone_of(family)
    expected = expected_layers(family, backbone, level)
    options = QuantOptions(level=level)
    if not expected:  # level 1 of a transformer: its one convolution makes the patches, and stays
        assert level == 1
        with pytest.raises(DiffcError, match="quantizes no layer"):
            insert_quantizers(backbone, FORMATS["fp8"], FAMILIES[family].unquantized, options)
        return
    insert_quantizers(backbone, FORMATS["fp8"], FAMILIES[family].unquantized, options)
    assert quantized(backbone) == expected
    attention = {role_of(n) for n in enabled_quantizers(backbone)} - {"weight_quantizer", "input_quantizer"}
    assert attention == ({f"{r}_bmm_quantizer" for r in "qkv"} if level == 4 else set())


def test_levels_grow() -> None:
    for family in BACKBONES:
        sizes = [len(expected_layers(family, backbone_of(family), level)) for level in LEVELS[:4]]
        assert sizes == sorted(set(sizes)), family


@pytest.mark.parametrize(
    ("patterns", "kept"),
    [
        (("transformer_blocks.0.*",), lambda n: n.startswith("transformer_blocks.0.")),
        (("*.ff.*", "*.to_out.?"), lambda n: ".ff." in n or n.endswith("to_out.0")),
        (("*.[kq]",), lambda n: False),
        (("*to_[kq]",), lambda n: n.endswith(("to_k", "to_q"))),
    ],
)
def test_patterns_keep_layers(patterns: tuple[str, ...], kept: Any) -> None:
    plain, backbone = backbone_of("sd3"), backbone_of("sd3")
    insert_quantizers(plain, FORMATS["fp8"], FAMILIES["sd3"].unquantized)
    insert_quantizers(backbone, FORMATS["fp8"], FAMILIES["sd3"].unquantized, QuantOptions(keep=patterns))
    assert quantized(backbone) == {name for name in quantized(plain) if not kept(name)}


def test_keeping_everything_is_refused() -> None:
    with pytest.raises(DiffcError, match="or a pattern of yours"):
        insert_quantizers(backbone_of("sd3"), FORMATS["fp8"], "$^", QuantOptions(keep=("*",)))


@pytest.mark.parametrize(("family", "heads"), [("sd3", 24), ("sd3", 40), ("flux", 24)])
def test_attention_of_other_heads_stays(family: str, heads: int) -> None:
    """Its layers do not: only the product of q, k and v has no kernel."""
    changed = {"attention_head_dim": heads} | ({"axes_dims_rope": (8, 8, 8)} if family == "flux" else {})
    if family == "sd3":
        changed |= {"caption_projection_dim": 2 * heads}
    backbone = backbone_of(family, **changed)
    insert_quantizers(backbone, FORMATS["fp8"], FAMILIES[family].unquantized, QuantOptions(mha=True))
    roles = {role_of(name) for name in enabled_quantizers(backbone)}
    assert roles == {"weight_quantizer", "input_quantizer"}


def test_attention_is_chosen_module_by_module() -> None:
    """A UNet has heads of several sizes: 24 on one level and 64 on the next."""
    unet = backbone_of("sdxl", **NARROW)
    insert_quantizers(unet, FORMATS["fp8"], FAMILIES["sdxl"].unquantized, QuantOptions(mha=True))
    layers = {layer_of(n) for n in enabled_quantizers(unet) if role_of(n) == "v_bmm_quantizer"}
    attentions = {n: m for n, m in unet.named_modules() if hasattr(m, "heads") and hasattr(m, "to_q")}
    sizes = {name: module.inner_dim // module.heads for name, module in attentions.items()}
    assert set(sizes.values()) == {24, 64}
    assert layers == {name for name, size in sizes.items() if size == 64}


def test_methods_are_those_of_the_calibrator() -> None:
    from diffc.quantize.percentile import METHODS

    assert set(COLLECT_METHODS) == {"default", *METHODS}


def test_awq_full_is_modelopt_s_method_of_that_name() -> None:
    for name, method in (("int4_awq", "awq_full"), ("w4a8_awq", "awq_full"), ("nvfp4", "max")):
        assert algorithm_of(FORMATS[name], QuantOptions(awq="full")) == {"method": method}
    assert algorithm_of(FORMATS["int4_awq"], QuantOptions()) == {"method": "awq_lite"}
