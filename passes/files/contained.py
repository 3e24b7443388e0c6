"""Names of files that come from a file: joined to their folder here and nowhere else, and never out of it.

A model, an artifact, a package or an index can be anybody's. What it names must lie in its own folder, by the rules of
every system and after following links.
"""

from __future__ import annotations

import hashlib
import re
from itertools import pairwise
from pathlib import Path

from passes.base import PassError

_DEVICE = re.compile(r"(?i)(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$)[ ]*(\..*)?")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


def contained(folder: Path, name: object, *, what: str = "file", hub: bool = False) -> Path:
    """The path of `name` in `folder`; it need not exist. `what` says in the error what names it.

    With `hub`, a file of a snapshot in huggingface_hub's cache may be a link to a blob of the same repository.

    Raises PassError for a name that is not a relative path with forward slashes below `folder` on every system, and for
    one whose links lead out of it.
    """
    reason = why_outside(folder, name, hub=hub)
    if reason:
        shown = repr(name) if len(repr(name)) <= 200 else repr(name)[:200] + "..."
        raise PassError(
            f"{what} {shown} lies outside {folder}: {reason}. Fix: get it from a source that you trust, or put the"
            " file into that folder"
        )
    return folder / str(name)


def why_outside(folder: Path, name: object, *, hub: bool = False) -> str:
    """Why `name` does not lie in `folder`, as `contained` tells it; empty when it does."""
    reason = _why_not_a_name(name)
    if reason:
        return reason
    try:
        real, home = (folder / str(name)).resolve(), folder.resolve()
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # too long, not in the system's encoding, links in a circle
        return f"the system cannot follow it ({type(error).__name__})"
    if real == home:
        return "it is the folder itself"
    if not real.is_relative_to(home) and not (hub and _is_blob(real, home)):
        return "a link leads out of the folder"
    return ""


def _why_not_a_name(name: object) -> str:
    """Why `name` is not a path below a folder by the rules of every system; no file is looked at."""
    if not isinstance(name, str) or not name:
        return "it is empty" if name == "" else "it is not a text"
    if name.startswith(("/", "\\")):
        return "it is an absolute path"
    if "\\" in name or ":" in name:
        return "it has a backslash or a colon, which name other places on Windows"
    if any(ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in name):
        return "it has control characters"
    parts = name.split("/")
    if ".." in parts:
        return "it has .. in it"
    if any(len(part.encode()) > 255 for part in parts) or len(name) > 4000:
        return "it is too long"
    if any(_DEVICE.fullmatch(part) for part in parts):
        return "it is the name of a device on Windows"
    if any(part != "." and part[-1:] in (".", " ") for part in parts):
        return "it ends in a dot or a space, which Windows leaves out"
    return ""


def _is_blob(real: Path, home: Path) -> bool:
    """Whether `real` is a blob of the repository in the hub's cache of which `home` lies in a snapshot.

    The cache: models--OWNER--NAME/snapshots/REVISION/..., whose files are links to models--OWNER--NAME/blobs/HASH.
    """
    for snapshots, repository in pairwise(home.parents):
        if snapshots.name == "snapshots" and repository.name.startswith("models--"):
            return real.parent == repository / "blobs"
    return False


def safe_name(text: str, limit: int = 100) -> str:
    """`text` as a part of a file's name: letters, digits, `.`, `_` and `-`, at most `limit`, and no device's name.

    A text that is one already comes back as it is, a name that was changed ends in a hash of what it was, so that two
    names never become one.
    """
    clean = _UNSAFE.sub("-", text).strip(".-")[:limit] or "model"
    if _DEVICE.fullmatch(clean):
        clean = f"_{clean}"
    if clean == text:
        return text
    return f"{clean[: limit - 9]}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
