"""Reads the JSON or YAML of a cache plan: plain values, few of them, nothing that unfolds.

An alias of YAML can stand for a list of aliases, and so on: half a kilobyte becomes a billion values once it is written
out. A plan needs none, so aliases and merge keys are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffc.errors import DiffcError
from diffc.records import of_pass_error
from passes.base import PassError
from passes.files.bounded import DEPTH, check_nesting, parse_json, read_text

_LARGEST = 1 << 20
"""Bytes of a plan: one with every block of FLUX in an entry of its own has 20 kB."""
_FIX = "see docs/cache.md"


def read_plan(path: Path) -> Any:
    """The plain values in a .json, .yaml or .yml file. Raises DiffcError when it cannot be read."""
    return read_values(path, "cache plan", fix=_FIX)


def read_values(path: Path, what: str, *, fix: str) -> Any:
    """The same of a file that is no plan: `what` says what it is, `fix` where its form is told."""
    try:
        text = read_text(path, _LARGEST)
        value = parse_json(text, path) if path.suffix == ".json" else _parse_yaml(text, path)
        check_nesting(value, path)
    except PassError as error:
        found = of_pass_error(error, fix)
        raise DiffcError(f"cannot read the {what}: {found.what}", fix=found.fix) from error
    return value


def _parse_yaml(text: str, path: Path) -> Any:
    import yaml

    class Plain(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no type information
        """YAML without aliases and merge keys, of a limited depth."""

        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            """As SafeLoader, which follows an alias here."""
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it has an alias (*), which it does not need")
            self.depth += 1
            if self.depth > DEPTH:
                raise yaml.YAMLError(f"it is nested deeper than {DEPTH} lists and mappings")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def flatten_mapping(self, node: Any) -> None:
            """As SafeLoader, which follows a merge key here."""
            if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
                raise yaml.YAMLError("it has a merge key (<<), which it does not need")
            super().flatten_mapping(node)

    try:
        return yaml.load(text, Plain)  # a SafeLoader that refuses more
    except RecursionError as error:
        raise PassError(f"{path} is nested too deep") from error
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise PassError(f"{path} is not YAML: {error}") from error
