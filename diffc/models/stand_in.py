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


class PlainConfig(dict[str, Any]):
    """A config whose entries are attributes as well, as diffusers' FrozenDict has them, for use without it."""

    def __getattr__(self, name: str) -> Any:
        """The entry of that name."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def full_config(family: Family, config: Mapping[str, Any]) -> Any:
    """The config as diffusers' FrozenDict, with the defaults of what an older config.json leaves out.

    Without diffusers it is what config.json has.
    """
    try:
        from diffusers.configuration_utils import FrozenDict

        parameters = inspect.signature(class_of(family.backbone_class).__init__).parameters.values()
    except ImportError:
        return PlainConfig(config)
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
