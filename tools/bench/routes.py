"""One route of tools/bench/compile.py, in a process of its own: ROUTE SOURCE FORMAT OUTPUT REPORT PIXELS."""

from __future__ import annotations

import gc
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
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
    run = {"diffc": diffc_route, "diffc+loras": loras_route, "copy": copy_route, "modelopt": modelopt_route}[
        route
    ]
    size = int(sys.argv[7 if route == "copy" else 6])
    content = {
        "parameters": parameters(source),
        **run(source, format, Path(output), size),
        "stages": STAGES,
    }
    Path(report).write_text(json.dumps(content), encoding="utf-8")
    gc.freeze()  # as diffc's command does at its end, for every route


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


def diffc_route(
    source: Path, format: str, output: Path, _: int, loras: Sequence[Path] = ()
) -> dict[str, Any]:
    """Trace, rewrite, write: what `diffc compile --skip-validation --from-checkpoint` does without an engine."""
    with stage("import libraries"):
        from diffc.frontend.trace import trace
        from diffc.models.sources.locate import locate
        from diffc.models.sources.lora_files import LoraSpec
        from diffc.models.sources.loras import with_loras
        from passes import Pipeline
        from passes.presets import CANONICAL, target_passes
        from passes.storage import save
    with stage("find the model, quantizers with amax 1"):
        found = locate(str(source))
        if loras:
            found = with_loras(found, [LoraSpec(str(file), 0.8) for file in loras])
        checkpoint = ones(found, format)
        dtype = found.dtype
    with stage("trace"):
        model = trace(found, dtype=dtype, checkpoint=checkpoint)
    with stage("passes"):
        result = Pipeline([*CANONICAL, *target_passes("trt-rtx")]).run(model)
    with stage("weights"):
        save(result.model, output / "model.onnx")
    return {"nodes": len(result.model.graph.node)}


def loras_route(source: Path, format: str, output: Path, _: int) -> dict[str, Any]:
    """The same with two LoRAs of rank 16 on every matrix; making their files is no stage of it."""
    from diffc.models.sources.locate import locate
    from tools.bench.weights import random_lora

    found = locate(str(source))
    with tempfile.TemporaryDirectory(dir=output) as folder:
        files = [random_lora(found, Path(folder), rank=16, number=number) for number in range(2)]
        return diffc_route(source, format, output, 0, files)


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

    from diffc.models.sources.backbone import build_backbone
    from diffc.quantize.checkpoint import Checkpoint
    from diffc.quantize.convert import enabled_quantizers, insert_quantizers
    from diffc.quantize.fingerprint import backbone_config
    from diffc.quantize.formats import FORMATS
    from diffc.quantize.state import settings_of

    spec = source.family
    with FakeTensorMode(allow_non_fake_inputs=True):
        backbone = build_backbone(spec, source.config, torch.float32)
        insert_quantizers(backbone, FORMATS[format], spec.unquantized)
    settings = {n: settings_of(q.get_modelopt_state()) for n, q in enabled_quantizers(backbone).items()}
    amax = dict.fromkeys(settings, np.ones((), np.float32))
    return Checkpoint(spec.name, format, backbone_config(backbone), settings, amax)


def modelopt_route(source: Path, format: str, output: Path, pixels: int) -> dict[str, Any]:
    """What examples/diffusers/quantization of NVIDIA/Model-Optimizer does to a backbone, as of ModelOpt 0.47.

    Its steps in its order: `quantize.py` loads to the GPU, quantizes, disables what its filter names, and moves the
    model to the CPU and back before the export; `modelopt_export_sd` of `onnx_utils/export.py` exports at opset 20
    into a temporary folder inside the output's, loads that with all weights, rewrites it (`_rewritten`), saves it with
    one file of external data, and removes the temporary folder. Left out: the pipeline's other models, calibration
    (every amax is 1), and what SDXL's FP8 convolutions ask for (scales as INT8, zero points turned to FP8).
    """
    with stage("import libraries"):
        import diffusers
        import modelopt.torch.quantization as mtq
        import onnx
        import torch
        from diffusers.models.normalization import RMSNorm

        # The example's own patch: the TorchScript exporter has no translation of torch's RMSNorm.
        torch.nn.RMSNorm = RMSNorm  # type: ignore[misc]

    from diffc.models.sources.locate import locate

    found = locate(str(source))
    spec = found.family
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = stored_type(source)
    with stage("load the model"):
        model = getattr(diffusers, spec.backbone_class).from_pretrained(source, torch_dtype=dtype).to(device)
    with stage("quantize with amax 1"):
        rules = {"fp8": mtq.FP8_DEFAULT_CFG, "nvfp4": mtq.NVFP4_DEFAULT_CFG}[format]
        mtq.quantize(model, {**rules, "algorithm": None})
        mtq.disable_quantizer(model, lambda name: re.match(spec.unquantized, name) is not None)
        for quantizer in (
            m for m in model.modules() if isinstance(m, mtq.nn.TensorQuantizer) and m.is_enabled
        ):
            quantizer.amax = torch.ones((), device=device, dtype=dtype)
            quantizer._trt_high_precision_dtype = {"torch.bfloat16": "BFloat16"}.get(str(dtype), "Half")
    with stage("to the CPU and back"):
        model.to("cpu")
        if device == "cuda":
            torch.cuda.empty_cache()
        model.to(device).eval()
    temporary = Path(tempfile.mkdtemp(prefix=".modelopt-raw-", dir=output))
    with stage("export"):
        _torchscript_export(model, spec, found.config, format, pixels, temporary / "model.onnx")
    with stage("load again"):
        graph = onnx.load(str(temporary / "model.onnx"), load_external_data=True)
    with stage("post-process"):
        graph = _rewritten(graph, spec.name, format)
    with stage("save"):
        onnx.save(
            graph,
            str(output / "model.onnx"),
            save_as_external_data=True,
            all_tensors_to_one_file=True,
            location="model.onnx_data",
            size_threshold=1024,
        )
        shutil.rmtree(temporary)
    return {"nodes": len(graph.graph.node)}


def _torchscript_export(
    model: Any, spec: Any, config: Mapping[str, Any], format: str, pixels: int, file: Path
) -> None:
    """The example's export: inputs at the model's own size (or `pixels`), axes dynamic, constants folded."""
    import torch
    from modelopt.torch.quantization.export_onnx import configure_linear_module_onnx_quantizers

    from diffc.models.inputs import forward_kwargs, random_inputs

    shape = spec.native(config)
    if pixels:
        shape = replace(shape, batch=1, height=pixels, width=pixels, text=32)
    values = random_inputs(spec, config, shape, dtype=model.dtype, seed=0)
    inputs = forward_kwargs(spec, config, {k: v.to(model.device) for k, v in values.items()})
    axes = {item.name: _dynamic_axes(item.dims) for item in spec.inputs(config)}
    if spec.name == "flux":
        axes["encoder_hidden_states"], axes["txt_ids"] = {0: "batch"}, {}  # text is not dynamic there
    fp4 = configure_linear_module_onnx_quantizers(model) if format == "nvfp4" else nullcontext()
    with fp4, torch.inference_mode():
        torch.onnx.export(
            model,
            (),
            file.as_posix(),
            kwargs=inputs | {"return_dict": False},
            input_names=list(axes),
            output_names=["latent"],
            dynamic_axes={**axes, "latent": _dynamic_axes(spec.output_dims(config))},
            do_constant_folding=True,
            opset_version=20,
            dynamo=False,
        )


def _dynamic_axes(dims: Sequence[str | int]) -> dict[int, str]:
    return {axis: name for axis, name in enumerate(dims) if isinstance(name, str)}


def _rewritten(graph: Any, family: str, format: str) -> Any:
    """What the example does between load and save, with all weights in memory.

    NVFP4: ModelOpt's exporter compresses the weights. FP8 of FLUX: `flux_convert_rope_weight_type`, a graphsurgeon
    import and export whose result is thrown away. FP8 of others: two such round trips, with clean-up, that count.
    """
    if format == "nvfp4":
        from modelopt.onnx.export import NVFP4QuantExporter

        return NVFP4QuantExporter.process_model(graph)
    import onnx_graphsurgeon as gs

    if family == "flux":
        imported = gs.import_onnx(graph)
        for node in imported.nodes:
            if node.op == "Einsum":
                node.inputs[1].dtype = "float32"
        gs.export_onnx(imported)
        return graph
    for _ in range(2):
        graph = gs.export_onnx(gs.import_onnx(graph).cleanup().toposort())
    return graph


if __name__ == "__main__":
    main()
