"""Fields of requests take what people give, and hold what diffc works with."""

from __future__ import annotations

import pickle
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath

import pytest

from diffc.commands.bench.run import BenchRequest
from diffc.commands.generate import GenerateRequest
from diffc.commands.package.request import PackageRequest
from diffc.commands.slim import SlimRequest
from diffc.commands.validate import ValidateRequest
from diffc.compile.request import CompileRequest, dtype_name


def test_a_request_takes_text_paths_and_single_values() -> None:
    given = CompileRequest(Path("m"), "out", targets="ort-cuda", sms=89, dump="d", cache_plan=Path("p.json"))
    assert (given.model, given.output, given.targets, given.sms) == ("m", Path("out"), ("ort-cuda",), (89,))
    assert (given.dump, given.cache_files) == (Path("d"), (Path("p.json"),))
    assert CompileRequest("m", "o", sms=["8.9", 120], prompts="a fox").sms == (89, 120)
    assert CompileRequest("m", "o", prompts="a fox").prompts == ("a fox",)
    assert given == CompileRequest(
        "m", Path("out"), targets=["ort-cuda"], sms=[89], dump=Path("d"), cache_plan="p.json"
    )
    assert replace(given, output="b").output == Path("b")
    assert asdict(given)["targets"] == ("ort-cuda",)
    assert pickle.loads(pickle.dumps(given)) == given
    assert hash(given) == hash(replace(given))
    with pytest.raises(TypeError, match="output"):
        CompileRequest("m")


def test_home_is_filled_in() -> None:
    assert CompileRequest("m", "~/out").output == Path.home() / "out"
    assert CompileRequest("m", "a~b").output == Path("a~b")


@pytest.mark.parametrize(
    ("given", "kept"),
    [("fp4", "nvfp4"), ("FP8", "fp8"), ("int8-smoothquant", "int8_smoothquant"), ("NVFP4_DEFAULT_CFG", "nvfp4"),
     ("awq", "int4_awq"), ("fp9", "fp9")],
)  # fmt: skip
def test_formats_have_modelopts_names(given: str, kept: str) -> None:
    assert CompileRequest("m", "o", format=given).format == kept


@pytest.mark.parametrize(
    ("given", "kept"),
    [("Half", "float16"), ("BFloat16", "bfloat16"), ("torch.float16", "float16"), ("bf16", "bfloat16"),
     ("Float", "float32"), ("auto", "auto"), ("float8", "float8")],
)  # fmt: skip
def test_types_have_modelopts_names(given: str, kept: str) -> None:
    assert dtype_name(given) == CompileRequest("m", "o", dtype=given).dtype == kept


def test_every_request_takes_text() -> None:
    requests = (
        ValidateRequest("a", against=PurePosixPath("x.onnx"), model=Path("m")),
        BenchRequest("a", against="eager"),
        GenerateRequest("a", "o.png", "a fox", compare="torch", pipeline=Path("p")),
        PackageRequest("a", "o", components="c", pipeline=Path("p")),
        SlimRequest("a", "o", targets="ort", sms=89),
    )
    assert {request.artifact for request in requests} == {Path("a")}
    validate, bench, generate, package, slim = requests
    assert (validate.against, validate.model) == ("x.onnx", "m")
    assert (bench.against, generate.compare, generate.pipeline) == (("eager",), ("torch",), "p")
    assert (package.components, package.pipeline) == (Path("c"), "p")
    assert (slim.targets, slim.sms) == (("ort",), (89,))
