"""Where the networks of metrics come from: a folder or file of yours, or a repository of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffc.errors import DiffcError


def folder_of(name: str, option: str, patterns: tuple[str, ...]) -> Path:
    """The folder `name`, or what the hub (or its cache) has under that id, of which the files `patterns` are fetched.

    Raises DiffcError when it is neither; `option` names the option that gives it.
    """
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    return Path(_from_hub(name, option, allow_patterns=list(patterns)))


def file_of(name: str, option: str) -> Path:
    """The file `name`, or OWNER/REPOSITORY/FILE of the hub or its cache. Raises DiffcError when it is neither."""
    if Path(name).expanduser().is_file():
        return Path(name).expanduser()
    repository, _, file = name.rpartition("/")
    if repository.count("/") != 1:
        raise _lacking(name, option, "no such file")
    return Path(_from_hub(repository, option, allow_patterns=[file])) / file


def _from_hub(name: str, option: str, **wanted: Any) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        try:
            folder: str = snapshot_download(name, local_files_only=True, **wanted)
        except LocalEntryNotFoundError:
            folder = snapshot_download(name, **wanted)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise _lacking(name, option, str(error).splitlines()[0]) from error
    return folder


def _lacking(name: str, option: str, why: str) -> DiffcError:
    return DiffcError(
        f"{name} is not here and cannot be fetched: {why}",
        fix=f"download it, and give its place with {option}",
    )
