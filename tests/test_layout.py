"""The plan of the house: which room may import from which, read from every import of `diffc` and `passes`.

A room is a file or folder at the top of its package. Imports inside functions and for types alone count like any other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests import ROOT

_BASICS = (
    "errors progress progress_bar plugins memory version output_files output_folders records apart locks paths"
    " terminal_text tensors passes"
)
_MODELS = f"models quantize cache {_BASICS}"

# Room: the rooms that it may import from, from top to bottom. "passes" stands for any room of that package.
DIFFC: Mapping[str, str] = {
    "": "runtime compile errors version",  # diffc/__init__.py: the names that users import
    "__main__": "cli",
    "cli": f"commands report sweep train compile runtime validate artifact backends frontend quality {_MODELS}",
    "commands": f"compile runtime validate artifact backends frontend quality {_MODELS}",
    "report": f"commands sweep compile runtime validate artifact backends frontend quality {_MODELS}",
    "serve": f"commands runtime artifact {_MODELS}",
    "sweep": f"commands compile runtime validate artifact backends frontend quality {_MODELS}",
    "train": f"compile validate artifact backends frontend {_MODELS}",
    "compile": f"validate artifact backends frontend {_MODELS}",
    "runtime": f"artifact backends {_MODELS}",
    "validate": f"artifact backends frontend {_MODELS}",
    "artifact": f"backends {_MODELS}",
    "backends": _MODELS,
    "frontend": _MODELS,
    "quality": _MODELS,
    "quantize": _BASICS,
    "models": _BASICS,
    "cache": "errors plugins records passes",
    "plugins": "errors passes",
    "errors": "",
    "progress": "",
    "memory": "errors",
    "tensors": "passes",
    "version": "",
    "paths": "",
    "output_files": "errors passes",
    "output_folders": "errors locks passes",
    "records": "errors passes",
    "apart": "errors",
    "locks": "",
    "terminal_text": "",
    "progress_bar": "progress terminal_text",
}
_GRAPHS = "graph weights base files"
PASSES: Mapping[str, str] = {
    "": "pipeline base",  # passes/__init__.py: the names that users import
    "presets": f"canonical importing targets cache pipeline storage {_GRAPHS}",
    "targets": f"canonical {_GRAPHS}",
    "importing": f"canonical {_GRAPHS}",
    "cache": f"canonical {_GRAPHS}",
    "canonical": _GRAPHS,
    "pipeline": _GRAPHS,
    "storage": _GRAPHS,
    "graph": "weights base files",
    "weights": "base files",
    "base": "plugins",
    "plugins": "",
    "files": "base",
}
ROOMS = {"diffc": DIFFC, "passes": PASSES}
MOST_ENTRIES = 12
"""Files and folders at the top of `passes`, but for the two that every package has."""

# A package's face may import its heaviest name when somebody asks for it.
FACES = ("diffc/__init__.py", "diffc/compile/__init__.py")

# What is still wrong. Take a line out when its file is put right; add none.
KNOWN_ARROWS: frozenset[tuple[str, str]] = frozenset()
KNOWN_LATE: frozenset[str] = frozenset()
KNOWN_CIRCLES: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Import:
    """One import of a module of ours: in which file and line, of which module, and whether inside a function."""

    file: str
    line: int
    module: str
    late: bool

    @property
    def source(self) -> tuple[str, str]:
        """The package and room of the file."""
        return room_of(module_of(self.file))

    @property
    def target(self) -> tuple[str, str]:
        """The package and room that is imported from."""
        return room_of(self.module)

    @property
    def allowed(self) -> bool:
        """Whether the table has this arrow."""
        (package, room), (other, wanted) = self.source, self.target
        rooms = ROOMS[package].get(room, "").split()
        if package != other:
            return other in rooms
        return room == wanted or wanted in rooms

    def __str__(self) -> str:
        package, room = self.source
        rooms = ROOMS[package].get(room)
        may = "is in no table: add it" if rooms is None else f"may import from: {rooms or 'nothing of ours'}"
        return f"{self.file}:{self.line} imports {self.module}; {package}.{room} {may}"


def module_of(file: str) -> str:
    """The dotted name of a file, of a package for its __init__.py."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room_of(module: str) -> tuple[str, str]:
    """Package and room of a dotted name."""
    package, _, rest = module.partition(".")
    return package, rest.partition(".")[0]


FILES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for package in ROOMS
    for path in sorted((ROOT / package).rglob("*.py"))
}
MODULES = {module_of(file): file for file in FILES}


def imports_of(file: str, text: str) -> Iterator[Import]:
    """Every import of ours in a file."""

    def visit(node: ast.AST, late: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            for module in _modules(child):
                if module.partition(".")[0] in ROOMS:
                    assert isinstance(child, ast.Import | ast.ImportFrom)
                    yield Import(file, child.lineno, module, late)
            yield from visit(child, late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    yield from visit(ast.parse(text), False)


def _modules(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [item.name for item in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "write imports in full: from diffc.room import name"
        full = [f"{node.module}.{item.name}" for item in node.names]
        return [name if name in MODULES else str(node.module) for name in full]
    return []


IMPORTS = [found for file, text in FILES.items() for found in imports_of(file, text)]


def told(wrong: list[Import]) -> str:
    """One line for every import that is wrong."""
    return "\n".join(["", *dict.fromkeys(map(str, wrong))])


def test_the_tables_have_no_circle_and_every_room() -> None:
    for package, table in ROOMS.items():
        graph = {room: [r for r in allowed.split() if r in table] for room, allowed in table.items()}
        list(TopologicalSorter(graph).static_order())  # raises CycleError
        there = {room_of(module)[1] for module in MODULES if room_of(module)[0] == package}
        assert there <= table.keys(), f"add to the table of {package}: {sorted(there - table.keys())}"


def test_arrows_point_one_way() -> None:
    wrong = [found for found in IMPORTS if not found.allowed]
    arrows = {(found.file, ".".join(found.target)) for found in wrong}
    assert not (new := [w for w in wrong if (w.file, ".".join(w.target)) not in KNOWN_ARROWS]), told(new)
    assert not (gone := KNOWN_ARROWS - arrows), f"put right, take out of KNOWN_ARROWS: {sorted(gone)}"


def test_own_modules_are_imported_at_the_top() -> None:
    """Late imports are for heavy libraries. In diffc/cli they keep `diffc --help` fast."""
    wrong = [f for f in IMPORTS if f.late and f.source != ("diffc", "cli") and f.file not in FACES]
    new = [w for w in wrong if w.file not in KNOWN_LATE]
    lines = sorted({f"{w.file}:{w.line} imports {w.module}" for w in new})
    assert not new, "\n".join(["inside a function, and should be at the top of the file:", *lines])
    assert not (gone := KNOWN_LATE - {w.file for w in wrong}), f"take out of KNOWN_LATE: {sorted(gone)}"


def test_no_files_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {file: set() for file in FILES}
    for found in IMPORTS:
        target = MODULES.get(found.module)
        if target is not None and target != found.file and found.file not in FACES:
            graph[found.file].add(target)
    seen: set[str] = set()
    while circle := _circle(graph):
        names = set(circle)
        assert names & KNOWN_CIRCLES, " -> ".join(circle)
        seen |= names
        for file in names & KNOWN_CIRCLES:
            graph[file] = set()
    assert not (gone := KNOWN_CIRCLES - seen), f"in no circle, take out of KNOWN_CIRCLES: {sorted(gone)}"


def _circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Files that import each other in a circle, empty where there are none."""
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def test_passes_has_few_entries_at_its_top() -> None:
    folder = sorted((ROOT / "passes").iterdir())
    entries = [p.name for p in folder if p.name not in ("__pycache__", "__init__.py", "py.typed")]
    assert len(entries) <= MOST_ENTRIES, f"{len(entries)} entries: {', '.join(entries)}"


@pytest.mark.parametrize(
    ("file", "text", "arrow", "late"),
    [
        ("passes/graph/edit.py", "from passes.pipeline import Pipeline", ("passes", "pipeline"), False),
        ("passes/base.py", "def f():\n    import diffc.errors", ("diffc", "errors"), True),
        ("diffc/runtime/load.py", "if TYPE_CHECKING:\n    from diffc import compile", ("diffc", "compile"), False),
        ("diffc/errors.py", "class A:\n    def f(self):\n        from passes import base", ("passes", "base"), True),
    ],
)  # fmt: skip
def test_a_wrong_import_is_found_wherever_it_stands(
    file: str, text: str, arrow: tuple[str, str], late: bool
) -> None:
    (found,) = imports_of(file, text)
    assert (found.target, found.late, found.allowed) == (arrow, late, False)
    assert found.file in str(found)
    assert found.module in str(found)


def test_a_right_import_is_let_through() -> None:
    texts = ("from diffc.backends.target import Target", "from passes.graph.check import check_structure")
    for text in texts:
        (found,) = imports_of("diffc/compile/plan.py", text)
        assert found.allowed


def test_paths_are_of_files_that_exist() -> None:
    listed = {*FACES, *KNOWN_LATE, *KNOWN_CIRCLES, *(file for file, _ in KNOWN_ARROWS)}
    assert not (missing := {file for file in listed if not Path(ROOT / file).is_file()}), missing
