"""One route of tools/bench_compile.py, in a process of its own: ROUTE SOURCE FORMAT OUTPUT REPORT PIXELS."""

from __future__ import annotations

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

STAGES: list[dict[str, Any]] = []


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Note wall and CPU seconds of a stage."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    STAGES.append({"name": name, "wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu})


def main() -> None:
    """Run the route and write its report."""
    route, source, format, output, report = sys.argv[1], Path(sys.argv[2]), *sys.argv[3:6]
    warnings.simplefilter("ignore")
    run = {"diffc": diffc_route, "copy": copy_route, "modelopt": modelopt_route}[route]
    size = int(sys.argv[7 if route == "copy" else 6])
    content = {
        "parameters": parameters(source),
        **run(source, format, Path(output), size),
        "stages": STAGES,
    }
    Path(report).write_text(json.dumps(content), encoding="utf-8")


def parameters(source: Path) -> int:
    """Values in the safetensors files of a folder, from their headers."""
    total = 0
    for file in source.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total


def stored_type(source: Path) -> Any:
    """The torch type of the weights in a folder."""
    import torch

    with next(iter(source.glob("*.safetensors"))).open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    first = next(entry for name, entry in header.items() if name != "__metadata__")
    return {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[first["dtype"]]


def diffc_route(source: Path, format: str, output: Path, _: int) -> dict[str, Any]:
    """Trace, rewrite, write: what `diffc compile --skip-validation --from-checkpoint` does without an engine."""
    with stage("import libraries"):
        from diffc.frontend.trace import trace
        from diffc.models.locate import locate
        from passes import Pipeline
        from passes.presets import CANONICAL, target_passes
        from passes.storage import save
    with stage("find the model, quantizers with amax 1"):
        found = locate(str(source))
        checkpoint = ones(found, format)
        from diffc.plan import stored_dtype

        dtype = stored_dtype(found)
    with stage("trace"):
        model = trace(found, dtype=dtype, checkpoint=checkpoint)
    with stage("passes"):
        result = Pipeline([*CANONICAL, *target_passes("trt-rtx")]).run(model)
    with stage("weights"):
        save(result.model, output / "model.onnx")
    return {"nodes": len(result.model.graph.node)}


def copy_route(source: Path, _: str, output: Path, size: int) -> dict[str, Any]:
    """Read every byte of the weights, and write `size` of them (0: all)."""
    left = size or sum(file.stat().st_size for file in source.glob("*.safetensors"))
    with stage("copy"), (output / "copy").open("wb") as out:
        for file in sorted(source.glob("*.safetensors")):
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 22):
                    out.write(chunk[:left])
                    left -= min(left, len(chunk))
        out.flush()
        os.fsync(out.fileno())
    return {}


def ones(source: Any, format: str) -> Any:
    """A checkpoint whose every amax is 1 (weights and inputs alike)."""
    import numpy as np
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from diffc.models.backbone import build_backbone
    from diffc.models.specs import find_spec
    from diffc.quantize.checkpoint import Checkpoint
    from diffc.quantize.convert import enabled_quantizers, insert_quantizers
    from diffc.quantize.fingerprint import backbone_config
    from diffc.quantize.formats import FORMATS
    from diffc.quantize.state import settings_of

    spec = find_spec(source.family)
    with FakeTensorMode(allow_non_fake_inputs=True):
        backbone = build_backbone(spec, source.config, torch.float32)
        insert_quantizers(backbone, FORMATS[format], spec.unquantized)
    settings = {n: settings_of(q.get_modelopt_state()) for n, q in enabled_quantizers(backbone).items()}
    amax = dict.fromkeys(settings, np.ones((), np.float32))
    return Checkpoint(spec.family, format, backbone_config(backbone), settings, amax)


def modelopt_route(source: Path, format: str, output: Path, pixels: int) -> dict[str, Any]:
    """ModelOpt's diffusers example: the whole model in memory, quantized, exported by the TorchScript exporter."""
    with stage("import libraries"):
        import diffusers
        import modelopt.torch.quantization as mtq
        import onnx
        import torch
        from diffusers.models.normalization import RMSNorm

        # The example's own patch: the TorchScript exporter has no translation of torch's RMSNorm.
        torch.nn.RMSNorm = RMSNorm  # type: ignore[misc]

        from diffc.frontend.inputs import forward_kwargs, random_inputs
        from diffc.models.specs import find_spec
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    spec = next(
        s
        for s in (find_spec(f) for f in ("flux", "sd3", "sdxl"))
        if s.backbone_class == config["_class_name"]
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with stage("load the model"):
        cls = getattr(diffusers, spec.backbone_class)
        dtype = stored_type(source)
        model = cls.from_pretrained(source, torch_dtype=dtype).to(device).eval()
    shape = spec.native(config)
    if pixels:
        shape = replace(shape, batch=1, height=pixels, width=pixels, text=32)
    values = random_inputs(spec, config, shape, dtype=dtype, seed=0)
    inputs = forward_kwargs(spec, config, {k: v.to(device) for k, v in values.items()})
    with stage("quantize with amax 1"):
        rules = {"fp8": mtq.FP8_DEFAULT_CFG, "nvfp4": mtq.NVFP4_DEFAULT_CFG}[format]
        mtq.quantize(model, {**rules, "algorithm": None})
        for quantizer in (
            m for m in model.modules() if isinstance(m, mtq.nn.TensorQuantizer) and m.is_enabled
        ):
            quantizer.amax = torch.ones((), device=device, dtype=dtype)
            quantizer._trt_high_precision_dtype = {"torch.bfloat16": "BFloat16"}.get(str(dtype), "Half")
            quantizer._onnx_quantizer_type = "dynamic"
        for module in model.modules():
            if hasattr(module, "weight_quantizer"):
                module.weight_quantizer._onnx_quantizer_type = "static"
    with stage("export"), torch.no_grad():
        inputs["return_dict"] = False
        (output / "export").mkdir()
        torch.onnx.export(
            model, (), str(output / "export" / "model.onnx"), kwargs=inputs, opset_version=20, dynamo=False
        )
    with stage("load and post-process"):
        graph = onnx.load(output / "export" / "model.onnx")
        if format == "nvfp4":
            from modelopt.onnx.export import NVFP4QuantExporter

            graph = NVFP4QuantExporter.process_model(graph)
    with stage("save"):
        onnx.save(graph, output / "model.onnx", save_as_external_data=True, location="model.onnx_data")
    return {"nodes": len(graph.graph.node)}


if __name__ == "__main__":
    main()
