"""Finds the model that MODEL of the command line names, by asking every reader in turn. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from diffc import plugins
from diffc.errors import DiffcError, UsageError
from diffc.models.embedded.catalogue import EMBEDDED
from diffc.models.sources import (
    backbone_folder,
    embedded_name,
    hub,
    pipeline_folder,
    released_name,
    single_file,
)
from diffc.models.sources.loras import with_recorded_loras
from diffc.models.sources.source import DEFAULT_HUB, HubOptions, ModelSource, Reader

__all__ = ["READERS", "ModelSource", "locate", "locate_again", "locate_base"]


def _readers(options: HubOptions) -> tuple[Reader, ...]:
    own = (
        embedded_name.READER,
        pipeline_folder.reader(options),
        backbone_folder.reader(options),
        single_file.READER,
    )
    last = (released_name.reader(options), hub.reader(options))
    added = plugins.load("diffc.readers", Reader, [reader.name for reader in (*own, *last)])
    return (*own, *added.values(), *last)


READERS: tuple[Reader, ...] = _readers(DEFAULT_HUB)
"""In the order in which they are asked; the first that does not decline reads."""


def locate(model: str, options: HubOptions = DEFAULT_HUB) -> ModelSource:
    """The backbone that `model` names, checked before anything heavy starts; a model of the hub is downloaded.

    Raises UnsupportedError for a class of backbone that diffc does not know, DiffcError for everything else
    that keeps the model from being read: missing, truncated or pickled weights, bad JSON; and, when no reader
    takes it, one that lists the readers and why each declined.
    """
    reasons = []
    for reader in _readers(options):
        reason = reader.declines(model)
        if reason is None:
            source = reader.open(model)
            _check_revision(source, options)
            return source
        reasons.append(f"\n  {reader.name}: {reason}")
    reasons.append(plugins.unusable_ones("diffc.readers", "reader"))
    expected = "; ".join(reader.expects for reader in READERS)
    close = get_close_matches(model.lower(), [*EMBEDDED, *released_name.RELEASED], 1)
    meant = f" Did you mean {close[0]}?" if close else ""
    raise DiffcError(f"nothing reads the model {model!r}.{meant}{''.join(reasons)}", fix=f"give {expected}")


def locate_again(manifest: Mapping[str, Any], options: HubOptions = DEFAULT_HUB) -> ModelSource:
    """The model that the compile of an artifact with this manifest found, its LoRAs included.

    `options` replace those of the compile.

    A model of the hub is found by its id and its commit when the folder of the compile is gone. Raises what `locate`
    raises.
    """
    return with_recorded_loras(locate_base(manifest, options), manifest)


def locate_base(manifest: Mapping[str, Any], options: HubOptions) -> ModelSource:
    """As `locate_again`, without the LoRAs."""
    request, described = manifest["request"], manifest["model"]
    found = options.over(HubOptions.from_json(request.get("hub", {})))
    try:
        return locate(request["model"], found)
    except DiffcError:
        if not described.get("revision") or request["model"] == described["name"]:
            raise
        return locate(described["name"], replace(found, revision=options.revision or described["revision"]))


def _check_revision(source: ModelSource, options: HubOptions) -> None:
    if options.revision and source.revision is None:
        raise UsageError(
            f"--revision {options.revision} is given, and {source.path} is not of the Hugging Face hub",
            fix="leave --revision out, or give OWNER/NAME",
        )
