"""Changes one thing in a file of `passes`, runs the file's own tests, and tells which changes no test saw.

    python -m tools.prove.mutants passes/files/contained.py passes/weights/journal.py --most 30 --seed 1

A change turns a comparison, a sign or an `and` round, moves a number by one, leaves out a `not`, or takes the other
branch. The tests are those of the file's place in `tests` (tests/passes/files/test_contained.py). Each change runs in a
process of its own; Linux, since it starts as a copy of one that has imported what tests import of other packages.
Prints a line for each change that was not seen, and a row for each file: changes, how many were tried, and seen.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib.abc
import importlib.util
import io
import multiprocessing
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEAVY = (
    "torch",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnx_graphsurgeon",
    "diffusers",
    "transformers",
    "hypothesis",
)
HANG = 120.0
"""Seconds after which the tests of a change count as failed."""
TURNED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
}


def main() -> int:
    """Judge the files that are named; the exit code is 0, whatever survives."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--most", type=int, default=30, help="changes of each file, drawn at random")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    for name in HEAVY:
        importlib.import_module(name)
    for file in options.files:
        tests = Path("tests", *file.parts[:-1], f"test_{file.name}")
        if failed(file, file.read_text("utf-8"), tests):
            raise SystemExit(f"{tests} fails without any change")
        changes = list(mutants(file.read_text("utf-8")))
        drawn = random.Random(options.seed).sample(changes, min(options.most, len(changes)))
        survivors = [what for what, source in drawn if not failed(file, source, tests)]
        for what in survivors:
            print(f"{file}:{what}", flush=True)
        print(f"| `{file}` | {len(changes)} | {len(drawn)} | {len(drawn) - len(survivors)} |", flush=True)
    return 0


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """Each change as "line: before -> after", and the source with it."""
    count = len(list(ast.walk(ast.parse(source))))
    for index in range(count):
        tree = ast.parse(source)
        node = list(ast.walk(tree))[index]
        before = copy.deepcopy(node)
        if _change(node):
            line = getattr(node, "lineno", 0)
            yield f"{line}: {ast.unparse(before)[:90]} -> {ast.unparse(node)[:90]}", ast.unparse(tree)


def _change(node: ast.AST) -> bool:
    """Change the node itself; False where there is nothing to change in it."""
    match node:
        case ast.Compare(ops=[op, *_]) if type(op) in TURNED:
            node.ops[0] = TURNED[type(op)]()  # type: ignore[call-overload]
        case ast.BoolOp(op=op) | ast.BinOp(op=op) if type(op) in TURNED:
            node.op = TURNED[type(op)]()  # type: ignore[assignment]
        case ast.UnaryOp(op=ast.Not()):
            node.op = ast.UAdd()
            node.operand = ast.Call(ast.Name("bool", ast.Load()), [node.operand], [])
        case ast.Constant(value=bool(value)):
            node.value = not value
        case ast.Constant(value=int(value)):
            node.value = value + 1
        case ast.If() | ast.IfExp() | ast.While():
            node.test = ast.UnaryOp(ast.Not(), node.test)
        case ast.Continue() | ast.Break():
            node.__class__ = ast.Pass  # type: ignore[assignment]
        case _:
            return False
    return True


class _Loader(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives one module another source."""

    def __init__(self, file: Path, source: str) -> None:
        self._name, self._file, self._source = ".".join(file.with_suffix("").parts), file, source

    def find_spec(self, name: str, *_: Any) -> Any:
        if name != self._name:
            return None
        return importlib.util.spec_from_file_location(name, self._file.absolute(), loader=self)

    def create_module(self, _: Any) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        exec(compile(self._source, str(self._file), "exec"), module.__dict__)


def failed(file: Path, source: str, tests: Path) -> bool:
    """Whether the tests fail when `file` has that source."""
    process: Any = multiprocessing.get_context("fork").Process(target=_judge, args=(file, source, tests))
    process.start()
    process.join(HANG)
    process.kill()
    process.join()
    return bool(process.exitcode)


def _judge(file: Path, source: str, tests: Path) -> None:
    import pytest

    sys.meta_path.insert(0, _Loader(file, source))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", str(tests)])
    sys.exit(int(code))


if __name__ == "__main__":
    sys.exit(main())
