"""Every command in the documents runs, or is checked as far as a CPU goes.

All documents use one artifact, which the demo makes: `build/digits-sd3-fp8`. Commands that take seconds run on it.
Those that take minutes, or a card, or a network, are held against the command line: their options and values, and a
compile by its own check of the request (`--dry-run`), with an embedded model in the place of one of the hub. The slow
test runs those of minutes, too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from diffc.cli.main import app, run
from tests import ROOT
from tests.cli_helpers import Capture
from tests.documents import COMMANDS, LINES, PAGES, README, Line, blocks
from tests.passes.weights.lora.files import factors, written
from tools import run as demo

QUICK = ["--steps", "1"]
SECONDS = (
    "doctor",
    "formats",
    "passes",
    "inspect",
    "slim",
    "report",
    "opt",
    "import",
    "cache list",
    "cache show",
    "models list",
)
"""Commands that the first lane runs as they stand."""
OF_THE_HUB = {
    "stabilityai/sdxl-turbo": "digits-sdxl",
    "stabilityai/stable-diffusion-xl-base-1.0": "digits-sdxl",
    "stabilityai/stable-diffusion-3.5-medium": "digits-sd3",
    "black-forest-labs/FLUX.1-dev": "digits-flux",
    "PIPELINE_FOLDER": "digits-sd3",
}
"""Models that need a network, and a name for the reader's own -> an embedded one of the same family."""
OTHERS = (
    "python3 tools/run.py ",
    "python -m tools.",
    "pip install ",
    "polygraphy ",
    "py -3.11 ",
    "py -m venv ",
    ".venv",
    "sh check/run.sh",
    "cd build/digits-sd3-fp8/validation && sh run.sh",
    "export POLYGRAPHY_USE_TENSORRT_RTX=1",
)
"""How lines of other programs begin; each kind has its check here, or in tests/commands/test_package_optimum.py."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the documents take as given, as the working directory."""
    monkeypatch.chdir(tmp_path)
    for name, size in (("in.onnx", "n"), ("exported/model.onnx", 2)):
        x, y = (helper.make_tensor_value_info(value, TensorProto.FLOAT, [size, 4]) for value in "xy")
        graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], "relu")], "g", [x], [y])
        Path(name).parent.mkdir(exist_ok=True)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), name)
    layer = "lora_unet_transformer_blocks_0_attn_to_q"
    written(Path("style.safetensors"), factors(layer, 128, 128))
    Path("prompts.txt").write_text("a handwritten seven\na handwritten three\n", encoding="utf-8")
    images = {name: f"{name}.png" for name in ("bf16", "nvfp4")}
    for index, file in enumerate(images.values()):
        Image.new("RGB", (32, 32), (90, 40 * index, 7)).save(file)
    entries = [{"prompt": prompt, "images": images} for prompt in ("a seven", "a three")]
    Path("pictures.json").write_text(json.dumps(entries), encoding="utf-8")
    options = "model: tiny-sd3\nformat: [none, int8]\nsteps: 1\ncalib-size: 1\nimage-size: 64\n"
    Path("sweep.yaml").write_text(options, encoding="utf-8")
    Path("build").mkdir()
    return tmp_path


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo ran: its artifact and its picture, as `python3 tools/run.py demo` leaves them in build/."""
    pytest.importorskip("tensorrt_rtx")
    folder = tmp_path_factory.mktemp("demo")
    moved = {str(path): str(folder / path.name) for path in (demo.OUTPUT, demo.PICTURE)}
    assert run([*(moved.get(part, part) for part in demo.DEMO[2:]), *QUICK]) == 0
    assert run([moved.get(part, part) for part in demo.PAINT[2:]]) == 0
    return folder


@pytest.fixture
def beside(demo_folder: Path, here: Path) -> Path:
    """The folder of `here` with the demo's artifact in it."""
    shutil.copytree(demo_folder / demo.OUTPUT.name, here / demo.OUTPUT.relative_to(ROOT))
    return here


def parsed(arguments: list[str]) -> dict[str, Any]:
    """What the command line makes of these arguments. Raises click's UsageError for what it does not take."""
    from typer.main import get_command

    command: Any = get_command(app)
    name, rest = "diffc", arguments
    while hasattr(command, "commands"):
        name, rest = rest[0], rest[1:]
        command = command.commands[name]
    params: dict[str, Any] = command.make_context(name, list(rest)).params
    return params


def test_lines_are_of_known_kinds() -> None:
    for line in LINES:
        assert line.arguments is not None or line.text.startswith(OTHERS), line
    in_readme = [line for line in LINES if line.page == README.name]
    assert sum(line.text.startswith("python3 tools/run.py ") for line in in_readme) == 2


@pytest.mark.parametrize("line", COMMANDS, ids=str)
def test_the_command_line_takes_every_command(line: Line) -> None:
    assert line.arguments
    parsed(line.arguments)


def test_what_the_command_line_does_not_take_is_found() -> None:
    with pytest.raises(Exception, match="No such option"):
        parsed(["slim", "a", "-o", "b", "--sme", "89"])
    with pytest.raises(AssertionError):
        check(["compile", "digits-sd3", "-o", "o", "--format", "nvfp4", "--target", "trt-rtx", "--sm", "89"])


def check(arguments: list[str]) -> None:
    """Let a compile check its request: model, format, target, SM, profile, and what they are together."""
    request = [OF_THE_HUB.get(word, word) for word in arguments]
    for option in ("--variant", "--revision", "--from-checkpoint", "--token"):  # of what is not here
        if option in request:
            at = request.index(option)
            request[at : at + 2] = []
    assert run([*request, *(() if "--dry-run" in request else ("--dry-run",))]) == 0


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.command == "compile"], ids=str)
def test_every_compile_passes_its_own_check(line: Line, here: Path, capsys: Capture) -> None:
    assert line.arguments
    if "trt-rtx" in line.arguments:
        pytest.importorskip("tensorrt_rtx")
    before = set(here.rglob("*"))
    check(line.arguments)
    assert capsys.readouterr().out.startswith("Would compile")
    assert set(here.rglob("*")) == before


def in_seconds(page: Path) -> list[Line]:
    """The commands of a page that the tests run as they stand."""
    whole = (line for line in COMMANDS if not {"ARTIFACT", "FOLDER"} & set(line.words))
    return [line for line in whole if line.page == page.name and line.command in SECONDS]


@pytest.mark.compiles
@pytest.mark.parametrize("page", [page for page in PAGES if in_seconds(page)], ids=lambda page: page.name)
def test_commands_of_seconds_run(page: Path, beside: Path, capsys: Capture) -> None:
    for line in in_seconds(page):
        assert line.arguments
        assert run(line.arguments) == 0, line
        assert capsys.readouterr().out, line
        if "-o" in line.arguments:
            assert (beside / line.arguments[line.arguments.index("-o") + 1]).exists(), line


@pytest.mark.compiles
def test_the_demo_runs_and_says_where_its_result_is(demo_folder: Path) -> None:
    with Image.open(demo_folder / demo.PICTURE.name) as picture:
        assert min(picture.size) > 300
    for place in (demo.OUTPUT, demo.PICTURE):
        assert place.relative_to(ROOT).as_posix() in README.read_text(encoding="utf-8")
    engines = {path.name for path in (demo_folder / demo.OUTPUT.name / "engines").glob("*.engine")}
    assert engines == {"trt-rtx-sm89.engine", "trt-rtx-sm120.engine"}


def test_readme_says_what_the_demo_runs() -> None:
    """So the test of the demo is the test of these two lines."""
    shown = [
        line for line in COMMANDS if line.page == README.name and line.command in ("compile", "generate")
    ]
    for line, ours in zip(shown, (demo.DEMO, demo.PAINT), strict=True):
        assert line.arguments
        wanted = parsed([part.removeprefix(f"{ROOT}/").replace("\\", "/") for part in ours[2:]])
        found = parsed(line.arguments)
        differing = {name for name, value in wanted.items() if found[name] != value}
        assert differing <= {"force"}, differing


def pythons() -> Iterator[tuple[str, str, str]]:
    """Page, the comment for tests and text of every example in Python."""
    for page in PAGES:
        for told, kind, text in blocks(page):
            if kind == "python":
                yield page.name, told, text


@pytest.mark.compiles
@pytest.mark.parametrize(("page", "told", "text"), list(pythons()), ids=lambda value: value[:20])
def test_python_examples_run(page: str, told: str, text: str, request: pytest.FixtureRequest) -> None:
    if told == "of another environment":
        compile(text, page, "exec")
        return
    assert told == ("" if page == README.name else "runs"), f"say what {page} wants with this example"
    folder: Path = request.getfixturevalue("beside" if "build/digits-sd3-fp8" in text else "here")
    before = set(folder.iterdir())
    exec(compile(text, page, "exec"), {})
    assert set(folder.iterdir()) - before


def minutes(page: Path) -> list[Line]:
    """The commands of a page that take minutes, and neither a card nor a network."""
    found, lacking = [], set()
    for line in (line for line in COMMANDS if line.page == page.name and line.command not in SECONDS):
        words = line.arguments or []
        output = words[words.index("-o") + 1] if "-o" in words else ""
        needs_more = set(words) & (
            OF_THE_HUB.keys() | lacking | {"ARTIFACT", "FOLDER", "exported/model.onnx"}
        )
        engines_only = line.command == "compile" and "trt-rtx" in words and "ort" not in words
        if needs_more or (engines_only and "--from-checkpoint" not in words):
            lacking.add(output)
        elif "--dry-run" not in words and words[-1:] != ["build/digits-sd3-fp8"]:
            found.append(line)
    return found


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize("page", [page for page in PAGES if minutes(page)], ids=lambda page: page.name)
def test_commands_of_minutes_run(page: Path) -> None:
    for line in minutes(page):
        assert line.arguments
        assert run(line.arguments) == 0, line
