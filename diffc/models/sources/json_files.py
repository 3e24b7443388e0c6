"""JSON files of a model folder: config.json, model_index.json, and the index of shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffc.errors import DiffcError
from diffc.models.sources.inside import inside


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises DiffcError when the file cannot be read or holds something else."""
    inside(path.parent, path.name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DiffcError(f"cannot read {path}: {error}", fix="check the file and its permissions") from error
    except ValueError as error:
        raise DiffcError(f"{path} is not valid JSON: {error}", fix="download the file again") from error
    if not isinstance(content, dict):
        raise DiffcError(f"{path} holds no JSON object", fix="download the file again")
    return content
