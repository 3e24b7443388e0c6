"""diffc.load on CUDA: compiles small models itself, needs onnxruntime-gpu and a GPU (pytest -m gpu)."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import diffc
from diffc.compile.spine import CompileRequest, compile_model
from diffc.errors import DiffcError
from diffc.models.embedded.catalogue import materialize
from diffc.models.inputs import forward_kwargs, random_inputs
from diffc.models.registry import find_family
from diffc.models.spec import Shape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CASES = {"digits-sd3": "float16", "digits-flux": "bfloat16", "digits-sdxl": "float16"}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, dtype in CASES.items():
        folder = tmp_path_factory.mktemp("gpu") / name
        request = CompileRequest(name, folder, targets=("ort-cuda",), dtype=dtype, skip_validation=True)
        made[name] = compile_model(request).artifact.folder
    return made


def inputs(module: Any, family: str, shape: Shape, seed: int) -> dict[str, Any]:
    spec = find_family(family)
    values = random_inputs(spec, module.config, shape, dtype=module.dtype, seed=seed)
    return forward_kwargs(spec, module.config, {name: value.cuda() for name, value in values.items()})


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("batch", "width"), [(1, 64), (4, 96)])
def test_pipelines_paint_the_same(name: str, batch: int, width: int, artifacts: dict[str, Path]) -> None:
    from diffusers import DiffusionPipeline

    dtype = getattr(torch, CASES[name])
    pipe = DiffusionPipeline.from_pretrained(materialize(name), dtype=dtype).to("cuda")
    pipe.set_progress_bar_config(disable=True)

    def paint() -> torch.Tensor:
        images: torch.Tensor = pipe(
            ["a handwritten seven"] * batch,
            num_inference_steps=8,
            height=64,
            width=width,
            generator=torch.Generator().manual_seed(3),
            output_type="pt",
        ).images
        return images.float()

    expected = paint()
    component = "unet" if name == "digits-sdxl" else "transformer"
    with diffc.load(artifacts[name]) as module:
        assert (module.target, module.device.type, module.dtype) == ("ort-cuda", "cuda", dtype)
        setattr(pipe, component, module)
        error = float(torch.mean((paint() - expected) ** 2))
        assert error < 4e-3, error
        with pytest.raises(DiffcError, match="stays where it was loaded"):
            pipe.enable_model_cpu_offload()


def test_streams_and_threads_are_kept_apart(artifacts: dict[str, Path]) -> None:
    with diffc.load(artifacts["digits-sd3"]) as module:
        given = [
            inputs(module, "sd3", shape, s)
            for s, shape in enumerate([Shape(1, 64, 64, 24), Shape(4, 64, 96, 40)])
        ]
        alone = [module(**g).sample.clone() for g in given]
        torch.cuda.synchronize()
        results: list[list[torch.Tensor]] = [[], []]

        def work(index: int) -> None:
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream):
                for _ in range(30):
                    # Made and used on this stream, without waiting: a missing order would show.
                    fresh = {
                        n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in given[index].items()
                    }
                    results[index].append(module(**fresh).sample * 1)
            stream.synchronize()

        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index in range(2):
            assert all(torch.allclose(r, alone[index], atol=2e-3) for r in results[index])


@pytest.mark.parametrize("name", CASES)
def test_recorded_launches_give_the_same(name: str, artifacts: dict[str, Path]) -> None:
    """Two shapes in turns, new values each time; what was returned before stays as it was."""
    family = name.removeprefix("digits-")
    shapes = [Shape(1, 64, 64, 24), Shape(4, 64, 96, 40)]
    with diffc.load(artifacts[name]) as plain, diffc.load(artifacts[name], cuda_graph=True) as recorded:
        kept = []
        for seed in range(6):
            given = inputs(plain, family, shapes[seed % 2], seed)
            expected = plain(**given).sample
            got = recorded(**given).sample
            assert torch.allclose(got, expected, atol=2e-2 if CASES[name] == "bfloat16" else 2e-3)
            kept.append((got, got.clone()))
        torch.cuda.synchronize()
        assert all(torch.equal(got, then) for got, then in kept)
        assert not torch.equal(kept[0][0], kept[2][0])


def test_tensors_of_the_cpu_are_refused(artifacts: dict[str, Path]) -> None:
    with diffc.load(artifacts["digits-sd3"]) as module:
        given = inputs(module, "sd3", Shape(2, 64, 64, 24), 1)
        with pytest.raises(DiffcError, match="is on cpu"):
            module(**(given | {"hidden_states": given["hidden_states"].cpu()}))
