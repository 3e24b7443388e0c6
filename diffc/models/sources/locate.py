"""Finds the model that MODEL of the command line names, by asking every reader in turn. Nothing here imports torch."""

from __future__ import annotations

from diffc import plugins
from diffc.errors import DiffcError
from diffc.models.sources import backbone_folder, embedded_name, pipeline_folder
from diffc.models.sources.source import ModelSource, Reader

__all__ = ["READERS", "ModelSource", "locate"]

_OWN = (embedded_name.READER, pipeline_folder.READER, backbone_folder.READER)
_ADDED = plugins.load("diffc.readers", Reader, [reader.name for reader in _OWN])
READERS: tuple[Reader, ...] = (*_OWN, *_ADDED.values())
"""In the order in which they are asked; the first that does not decline reads."""


def locate(model: str) -> ModelSource:
    """The backbone that `model` names, checked before anything heavy starts.

    Raises UnsupportedError for a class of backbone that diffc does not know, DiffcError for everything else
    that keeps the model from being read: missing, truncated or pickled weights, bad JSON; and, when no reader
    takes it, one that lists the readers and why each declined.
    """
    reasons = []
    for reader in READERS:
        reason = reader.declines(model)
        if reason is None:
            return reader.open(model)
        reasons.append(f"\n  {reader.name}: {reason}")
    expected = "; ".join(reader.expects for reader in READERS)
    raise DiffcError(f"nothing reads the model {model!r}{''.join(reasons)}", fix=f"give {expected}")
