"""The command that a report shows asks for the very compile that the manifest holds."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

import pytest

from diffc.backends.target import EngineOptions
from diffc.cli.main import run
from diffc.compile import spine
from diffc.compile.manifest import request_content
from diffc.compile.request import CompileRequest
from diffc.models.sources.lora_files import LoraSpec
from diffc.models.sources.source import HubOptions
from diffc.quantize.options import QuantOptions
from diffc.report.command import command_of

REQUESTS = {
    "plain": CompileRequest("digits-sd3", "out"),
    "engines": CompileRequest(
        "digits-sd3", "out", "fp8", ("trt-rtx", "ort"), (89, 120), engine=EngineOptions(optimization_level=2)
    ),
    "options": CompileRequest(
        "digits-sd3",
        "out",
        "int8_smoothquant",
        dtype="float16",
        options=QuantOptions(alpha=0.5, keep=("*.ff.*", "proj out")),
        calib_size=3,
        steps=2,
        guidance=3.5,
        negative_prompt="it's; $(bad)",
        image_size=64,
        seed=7,
        profile="batch=1:2:4",
        cache_plan="blocks:every=2,first=1,last=1",
        cache_layout="segments",
        skip_validation=True,
        component_dtypes=(("vae", "float32"),),
    ),
    "loras": CompileRequest(
        "digits-sd3", "out", loras=(LoraSpec("digits-inverted", 0.5, (("*attn*", 0.25),)),)
    ),
    "hub": CompileRequest("digits-sd3", "out", hub=HubOptions(variant="fp16", subfolder="a b")),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_the_command_line_reads_it_as_the_same_request(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = request_content(REQUESTS[name])
    command = command_of(json.loads(json.dumps(wanted)), "out")
    asked: list[CompileRequest] = []

    def compile_model(request: CompileRequest, _: object) -> None:
        asked.append(request)
        raise KeyboardInterrupt

    monkeypatch.setattr(spine, "compile_model", compile_model)
    monkeypatch.setattr("diffc.compile.plan.check", lambda request: None)
    assert run(shlex.split(command)[1:]) == 130
    assert request_content(asked[0]) == wanted


def test_prompts_come_from_a_file() -> None:
    request = replace(REQUESTS["plain"], format="fp8", prompts=("a seven", "a three"))
    assert "--prompts-file prompts.txt" in command_of(request_content(request), "out")
