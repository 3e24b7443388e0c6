"""What stands in a backbone's place in a pipeline: its config, and the attributes that pipelines read from it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from diffc.models.family import Family


def class_of(name: str) -> Any:
    """The diffusers class of a backbone."""
    import diffusers

    return getattr(diffusers, name)


def full_config(spec: Family, config: Mapping[str, Any]) -> Any:
    """The config as diffusers' FrozenDict, with the defaults of what an older config.json leaves out."""
    from diffusers.configuration_utils import FrozenDict

    parameters = inspect.signature(class_of(spec.backbone_class).__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return FrozenDict(defaults | dict(config))


def take_attributes(owner: Any, family: Family, config: Mapping[str, Any]) -> None:
    """Give `owner` what pipelines read from a backbone of the family beside its config."""
    for path, value in family.attributes(config).items():
        _set_at(owner, path, value)


def _set_at(owner: Any, path: str, value: Any) -> None:
    """Give `owner` the attribute at a dotted path, with empty objects on the way to it."""
    first, _, rest = path.partition(".")
    if not rest:
        setattr(owner, first, value)
        return
    if not hasattr(owner, first):
        setattr(owner, first, SimpleNamespace())
    _set_at(getattr(owner, first), rest, value)
