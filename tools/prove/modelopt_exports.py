"""Makes the ONNX files that ModelOpt's diffusion scripts write, of small backbones, with outputs of the torch model.

    python -m tools.prove.modelopt_exports OUT --models sdxl,sd3 --formats fp8,nvfp4 --dtypes float16

The steps are those that ModelOpt documents (examples/diffusers/quantization, quantize.py --onnx-dir), in their order,
through ModelOpt's public functions. What differs: the backbones are small, calibration runs random inputs, and all of
it works on the CPU. Formats int4, w4a8 and mxfp8 are of the library; the scripts have no option for them.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffc.quantize.simulate import cpu_block_quant
from tools.prove.modelopt_models import BACKBONES, Backbone, Inputs

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TENSORRT_TYPES = {"float32": "Float", "float16": "Half", "bfloat16": "BFloat16"}
FORMATS = ("none", "int8", "fp8", "fp8+mha", "int4", "w4a8", "nvfp4", "nvfp4+mha", "mxfp8", "svd")
OPSET = 20


def main() -> None:
    """Write every export that is asked for and not there yet; print what cannot be exported, and why."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", default=",".join(BACKBONES))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    args = parser.parse_args()
    _patch_rms_norm()
    for model in args.models.split(","):
        for format in args.formats.split(","):
            for dtype in args.dtypes.split(","):
                folder = args.out / f"{model}-{format}-{dtype}"
                if (folder / "model.onnx").exists():
                    continue
                try:
                    export(BACKBONES[model], format, dtype, folder)
                    print(folder.name, "ok", flush=True)
                except Exception as error:  # of torch, ModelOpt and ONNX: the reason is the result
                    print(folder.name, "no export:", _line(error), flush=True)


def _patch_rms_norm() -> None:
    """quantize.py does the same: the TorchScript exporter has no translation of torch's RMSNorm."""
    from diffusers.models.normalization import RMSNorm

    torch.nn.RMSNorm = RMSNorm  # type: ignore[misc,assignment]
    torch.nn.modules.normalization.RMSNorm = RMSNorm  # type: ignore[misc,assignment]


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200] + f" ({type(error).__name__})"


def export(backbone: Backbone, format: str, dtype: str, folder: Path) -> None:
    """Write `folder`/model.onnx (weights beside it) and reference.npz of one cell.

    reference.npz holds, for the traced size (0) and another (1), `in{size}_{name}` and the outputs of the
    fake-quantized torch model in its own type (`out{size}`) and in float32 (`wide{size}`).
    """
    model = backbone.build(DTYPES[dtype])
    with cpu_block_quant(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if format != "none":
            quantize(backbone, model, format, dtype)
        held = references(backbone, model, dtype)
        made = exported(backbone, model, format, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "reference.npz", **held)
    save(made, folder / "model.onnx")


def quantize(backbone: Backbone, model: Any, format: str, dtype: str) -> None:
    """ModelOpt's quantizers, calibrated by two inputs; those that the scripts switch off are off."""
    import modelopt.torch.quantization as mtq

    config = _config(backbone, format, dtype)

    def calibrate(inner: Any) -> None:
        for size in (0, 1):
            inner(**backbone.keywords(backbone.inputs(size), DTYPES[dtype]))

    with torch.no_grad(), contextlib.redirect_stdout(None):
        mtq.quantize(model, config, calibrate)
        mtq.disable_quantizer(model, lambda name: re.match(backbone.kept, name) is not None)
        _switch_off(model, fp4=format.startswith(("nvfp4", "svd")), mha=format.endswith("+mha"))


def _config(backbone: Backbone, format: str, dtype: str) -> dict[str, Any]:
    """The presets of the diffusion scripts where they have one, else those of the library."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.opt.config_loader import load_config
    from modelopt.torch.quantization.config import QuantizeConfig

    name, _, mha = format.partition("+")
    library = {
        "int4": mtq.INT4_AWQ_CFG,
        "w4a8": mtq.W4A8_AWQ_BETA_CFG,
        "mxfp8": mtq.MXFP8_DEFAULT_CFG,
        "svd": mtq.NVFP4_SVDQUANT_DEFAULT_CFG,
    }
    if name in library:
        config = copy.deepcopy(library[name])
    else:
        preset = "nvfp4_fp8_mha" if (name, backbone.name) == ("nvfp4", "flux") else name
        loaded = load_config(f"configs/ptq/presets/diffusers/{preset}", schema_type=QuantizeConfig)
        config = loaded.model_dump(exclude_unset=True) | {"algorithm": {"method": "max"}}
    rules = list(config["quant_cfg"])
    # On a CPU, ModelOpt has no FP4 convolution of videos; the scripts leave that layer (patch_embedding) unquantized.
    rules.append({"parent_class": "nn.Conv3d", "quantizer_name": "*", "enable": False})
    if mha:
        rules.append({"quantizer_name": "*[qkv]_bmm_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}})
    for rule in rules:
        settings = rule.get("cfg") or {}
        if isinstance(settings, dict) and "num_bits" in settings:
            settings.setdefault("trt_high_precision_dtype", TENSORRT_TYPES[dtype])
    return {**config, "quant_cfg": rules}


def _switch_off(model: Any, *, fp4: bool, mha: bool) -> None:
    """No FP4 convolutions; no attention without `mha`, or with heads that are no multiple of 16."""
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    names = [f"{part}_quantizer" for part in ("q_bmm", "k_bmm", "v_bmm", "softmax", "bmm2_output")]
    for module in model.modules():
        if fp4 and isinstance(module, (torch.nn.Conv1d, torch.nn.Conv2d)):
            module.weight_quantizer.disable()
            module.input_quantizer.disable()
        elif isinstance(module, (Attention, AttentionModuleMixin)) and hasattr(module, "heads"):
            keeps = mha and (module.inner_dim // module.heads) % 16 == 0
            for quantizer in (getattr(module, n) for n in names if not keeps and hasattr(module, n)):
                quantizer.disable()
            module._disable_fp8_mha = not keeps


def references(backbone: Backbone, model: Any, dtype: str) -> dict[str, Any]:
    """Inputs and outputs of the torch model, before the export changes its scales; see `export`."""
    held: dict[str, Any] = {}
    for size in (0, 1):
        values = backbone.inputs(size)
        held |= {f"in{size}_{name}": value.numpy() for name, value in values.items()}
        held[f"out{size}"] = _run(backbone, model, values, DTYPES[dtype])
    wide = copy.deepcopy(model).float()
    for size in (0, 1):
        held[f"wide{size}"] = _run(backbone, wide, backbone.inputs(size), torch.float32)
    return held


def _run(backbone: Backbone, model: Any, values: Inputs, dtype: torch.dtype) -> Any:
    with torch.no_grad():
        given = {name: value.to(dtype).float() for name, value in values.items()}
        return model(**backbone.keywords(given, dtype))[0].float().numpy()


def exported(backbone: Backbone, model: Any, format: str, dtype: str) -> Any:
    """The ONNX model in memory, as the scripts leave it."""
    import onnx
    from modelopt.torch.quantization.export_onnx import configure_linear_module_onnx_quantizers

    blocks = format.startswith(("nvfp4", "svd", "mxfp8"))
    disguised = format.startswith("fp8") and _disguise_convolutions(model)
    context = configure_linear_module_onnx_quantizers(model) if blocks else contextlib.nullcontext()
    values = backbone.inputs(0)
    with tempfile.TemporaryDirectory(prefix="diffc-") as folder, context, torch.inference_mode():
        file = Path(folder) / "model.onnx"
        torch.onnx.export(
            model,
            (),
            file.as_posix(),
            kwargs=backbone.keywords(values, DTYPES[dtype]),
            input_names=list(values),
            output_names=[backbone.output],
            dynamic_axes=backbone.axes,
            do_constant_folding=True,
            opset_version=OPSET,
            dynamo=False,
            verbose=False,
        )
        made = onnx.load(file)
    if format.startswith(("nvfp4", "svd")):
        from modelopt.onnx.export import NVFP4QuantExporter

        return NVFP4QuantExporter.process_model(made)
    return _cleaned(made, disguised) if format.startswith("fp8") and backbone.name != "flux" else made


def _disguise_convolutions(model: Any) -> bool:
    """FP8 convolutions are exported as INT8 with scales of 448 in place of 127; whether there are any."""
    layers = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    convolutions = [m for m in layers if isinstance(m, torch.nn.Conv2d)]
    if not any(m.input_quantizer.is_enabled or m.weight_quantizer.is_enabled for m in convolutions):
        return False
    for layer in layers:
        if getattr(layer.input_quantizer, "_amax", None) is None:
            continue
        for quantizer in (layer.input_quantizer, layer.weight_quantizer):
            quantizer._num_bits = 8
            quantizer._amax = quantizer._amax * (127 / 448.0)
    return True


def _cleaned(made: Any, disguised: bool) -> Any:
    """Two round trips through graphsurgeon; in between, INT8 zero points become FP8 ones."""
    import onnx
    import onnx_graphsurgeon as gs

    made = gs.export_onnx(gs.import_onnx(made).cleanup().toposort())
    zero_points = {n.input[2] for n in made.graph.node if n.op_type == "QuantizeLinear" and len(n.input) > 2}
    for node in made.graph.node if disguised else ():
        if node.output[0] in zero_points:
            node.attribute[0].t.data_type = onnx.TensorProto.FLOAT8E4M3FN
    return gs.export_onnx(gs.import_onnx(made).cleanup())


def save(made: Any, path: Path, *, options: Mapping[str, Any] | None = None) -> None:
    """`made` with its weights in model.onnx_data, as the scripts write it."""
    import onnx

    path.with_name(path.name + "_data").unlink(missing_ok=True)
    onnx.save(
        made,
        str(path),
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=path.name + "_data",
        size_threshold=1024,
        **(options or {}),
    )


if __name__ == "__main__":
    main()
