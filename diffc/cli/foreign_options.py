"""Options of ModelOpt's scripts, demoDiffusion, trtexec and optimum-cli that have another name here, and which.

What docs/migration.md says in full, for who types the old name first.
"""

from __future__ import annotations

from collections.abc import Mapping

_NOTHING = "nothing: "
_ALWAYS = "nothing: it is always so"
_SIZES = "compile --profile batch=1:2:4,height=512:1024:1536"
_TIMES = "bench --against compile"
_PARSED = "nothing: engines/NAME.network.json of an artifact has the network as it was parsed"

INSTEAD: Mapping[str, str] = {
    "--model": "the model without an option: compile MODEL",
    "--override-model-path": "the folder without an option: compile MODEL",
    "--backbone": "nothing: the transformer or unet is found in the pipeline; VAEs are exported by package",
    "--model-dtype": "compile --dtype",
    "--trt-high-precision-dtype": "compile --dtype",
    "--cpu-offloading": "compile --calibrate synthetic, which needs no room",
    "--extra-param": "nothing: the pipeline's own configuration is read",
    "--ltx-skip-upsampler": "nothing: the upsampler is not compiled",
    "--quant-algo": "compile --format: the algorithm is in its name (int8_smoothquant, nvfp4_svdquant)",
    "--compress": _ALWAYS,
    "--quantized-torch-ckpt-save-path": "compile --save-checkpoint",
    "--restore-from": "compile --from-checkpoint",
    "--onnx-dir": "compile -o",
    "--engine-dir": "compile -o",
    "--hf-ckpt-dir": "checkpoint export --layout modelopt-hf",
    "--framework-model-dir": "compile --cache-dir",
    "--save-image-as": "generate -o",
    "--num-inference-steps": "generate --steps",
    "--denoising-steps": "generate --steps",
    "--torch": "generate --compare torch",
    "--onnx-load-path": "the file without an option: compile X.onnx",
    "--trt-engine-load-path": "nothing: an engine without its manifest does not say what it takes; generate ARTIFACT",
    "--dq-only": _ALWAYS,
    "--benchmark": _TIMES,
    "--torch-compile": _TIMES,
    "--skip-image": _TIMES,
    "--torch-autocast": "nothing: torch runs in the compute type",
    "--onnx": "the file without an option: compile X.onnx --target trt-rtx --sm 89",
    "--saveEngine": "compile X.onnx --target trt-rtx --sm 89 -o",
    "--minShapes": _SIZES,
    "--optShapes": _SIZES,
    "--maxShapes": _SIZES,
    "--build-static-batch": "compile --profile batch=2",
    "--build-dynamic-shape": _SIZES,
    "--builderOptimizationLevel": "compile --optimization-level",
    "--stronglyTyped": _ALWAYS,
    "--fp8": "compile --format fp8; of an .onnx file, nothing: the graph says every type",
    "--int8": "compile --format int8; of an .onnx file, nothing: the graph says every type",
    "--fp4": "compile --format nvfp4",
    "--fp16": "compile --dtype float16",
    "--bf16": "compile --dtype bfloat16",
    "--stripWeights": "compile --strip-weights",
    "--allowWeightStreaming": "compile --weight-streaming",
    "--ws": "compile --weight-streaming",
    "--low-vram": "nothing: move the other components in your pipeline; diffc has the backbone alone",
    "--timingCacheFile": "nothing: engines that are built ahead of time measure no kernels",
    "--dumpProfile": _PARSED,
    "--exportProfile": _PARSED,
    "--exportLayerInfo": _PARSED,
    "--exportTimes": "bench --json",
    "--loadInputs": "validate --script",
    "--exportOutput": "validate --script",
    "--loadRefOutputs": "validate --script",
    "--use-cuda-graph": "bench --cuda-graph",
    "--build-enable-refit": "compile --lora-slots, or relora",
    "--lora-path": "compile --lora",
    "--task": "nothing: it is read off the model",
    "--framework": "nothing: it is read off the model",
    "--opset": "nothing: it is 23; opt -p 'rewrite-opset{to=23}' raises other files",
    "--cache_dir": "compile --cache-dir",
    "--atol": "validate --tolerance",
    "--device": "nothing: a compile traces on no device",
    "--percentile": "bench --json, which has every time",
}
"""Old name -> the command and option to write, or why there is none ("nothing: ...")."""


def instead_of(option: str) -> str:
    """The line that says what to write for an option of another tool; empty where the option is not known."""
    told = INSTEAD.get(option, "")
    left_out = told.removeprefix(_NOTHING)
    if told == left_out:
        return told and f"\n  Fix: write {told}"
    return f"\n  Fix: leave it out: {left_out}"
