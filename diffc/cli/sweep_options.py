"""How `diffc sweep` reads its line: several values after one option, and a file of options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from diffc.cli.command import Command
from diffc.errors import UsageError

LISTS = (
    *("--model", "--format", "-f", "--sm", "--cache-plan", "--lora", "--dtype", "--exclude", "--target"),
    *("--bench", "--evaluate", "--prompt"),
)
"""Options that take every word up to the next option."""
ALONE: Mapping[str, Sequence[str]] = {"--bench": ("eager",), "--evaluate": ("psnr", "ssim")}
"""Options that can stand without a value, and what they mean then."""
TYPED: ContextVar[tuple[str, ...]] = ContextVar("typed", default=())
"""The line that was typed, while its command runs."""
_WORDS = "diffc.cli.sweep_options.words"
_SECRET = "--token"
_FIX = "write options as keys and their values: model: [tiny-sd3, tiny-flux]; see docs/sweep.md"


class SweepCommand(Command):
    """A command whose options take several values each, and whose argument is a file of options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Spell the options out, each with one value, and remember the line as it was written."""
        given = list(args)
        left = super().parse_args(ctx, list(spelled_out(args)))
        ctx.meta[_WORDS] = given
        return list(left)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; options of the file count where the line does not give them."""
        given, file = ctx.meta[_WORDS], ctx.params["file"]
        if file is not None:
            line = list(given)
            line.remove(str(file))
            names = {word.partition("=")[0] for word in line if word.startswith("-")}
            ctx = self.make_context(ctx.info_name, [*of_file(Path(file), names), *line], parent=ctx.parent)
        token = TYPED.set(("diffc", "sweep", *without_secret(given)))
        try:
            return super().invoke(ctx)
        finally:
            TYPED.reset(token)


def spelled_out(words: Sequence[str]) -> Iterator[str]:
    """`--sm 89 120` as `--sm 89 --sm 120`; `--bench` without a value with the ones that it means.

    Raises UsageError for another option without a value.
    """
    option, values = "", 0
    for word in [*words, "--"]:
        if word.startswith("-") and not word.lstrip("-")[:1].isdigit():
            if option in LISTS and not values:
                yield from _meant(option)
            option, values = word, 0
            if word not in LISTS and word != "--":
                yield word
        elif option in LISTS:
            values += 1
            yield from (option, word)
        else:
            yield word


def _meant(option: str) -> Iterator[str]:
    if option not in ALONE:
        raise UsageError(f"{option} has no value", fix=f"write {option} VALUE, or several values after it")
    yield from (part for value in ALONE[option] for part in (option, value))


def of_file(path: Path, given: set[str]) -> list[str]:
    """The words that a YAML file of options stands for, without the options `given` on the command line.

    Raises DiffcError for a file that cannot be read, UsageError for one of another form.
    """
    from diffc.cache.plan_file import read_values

    content = read_values(path, "file of options", fix=_FIX)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UsageError(f"{path} has no options", fix=_FIX)
    words: list[str] = []
    for key, value in content.items():
        option = f"--{key.replace('_', '-')}"
        if option not in given and value is not None and value is not False:
            words += [option] if value is True else [option, *_values(path, key, value)]
    return words


def _values(path: Path, key: str, value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [
        _condition(path, key, each) if isinstance(each, dict) else _text(path, key, each) for each in values
    ]


def _condition(path: Path, key: str, value: Mapping[Any, Any]) -> str:
    """`{format: nvfp4, sm: [86, 89]}` as `format=nvfp4,sm=86|89`."""
    if key != "exclude":
        raise UsageError(f"{path}: {key} is a mapping", fix=_FIX)
    return ",".join(f"{str(a).replace('_', '-')}={'|'.join(_values(path, key, v))}" for a, v in value.items())


def _text(path: Path, key: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UsageError(f"{path}: {key} has the value {value!r}", fix=_FIX)
    return str(value)


def without_secret(words: Sequence[str]) -> list[str]:
    """The words of a command, a token left out: a sweep writes down what repeats it."""
    found, skip = [], False
    for word in words:
        if not skip and not word.startswith(_SECRET):
            found.append(word)
        skip = word == _SECRET
    return found
