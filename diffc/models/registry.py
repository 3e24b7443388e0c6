"""The model families by name: those of `diffc/models/families/` (one file each, called FAMILY) and of plugins."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from diffc import plugins
from diffc.errors import DiffcError, UnsupportedError, unknown
from diffc.models import families
from diffc.models.captured import captured_family
from diffc.models.config_check import check_config
from diffc.models.family import Family
from diffc.models.interface import Interface
from diffc.models.spec import Config


def _listed() -> Mapping[str, Family]:
    names = sorted(module.name for module in pkgutil.iter_modules(families.__path__))
    found: list[Family] = [import_module(f"{families.__name__}.{name}").FAMILY for name in names]
    return {family.name: family for family in found}


_GROUP = "diffc.families"
_OWN = _listed()
FAMILIES: Mapping[str, Family] = {**_OWN, **plugins.load(_GROUP, Family, _OWN)}
_BACKBONE = re.compile(r"(Transformer|UNet|DiT)(?!.*(ControlNet|Controlnet))")


def find_family(name: str) -> Family:
    """The family of that name.

    Raises DiffcError that lists the known families, or names the packages of a plugin that cannot be used.
    """
    if name not in FAMILIES:
        unusable = plugins.unusable(_GROUP, "model family", name)
        raise unusable or unknown("model family", name, FAMILIES)
    return FAMILIES[name]


def family_of_manifest(model: Mapping[str, Any]) -> Family:
    """The family of a compiled backbone; `model` is that entry of its manifest.json.

    Raises DiffcError that lists the known families where neither a file nor an interface tells it.
    """
    if "family" not in model or "config" not in model:
        raise DiffcError("the manifest names no family of backbones, or no config", fix="compile again")
    if "captured" not in model:
        family = find_family(model["family"])
    else:
        try:
            family = captured_family(Interface.from_json(model["captured"]), model["config"])
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            said = f"the manifest's interface is damaged: {type(error).__name__}: {error}"
            raise DiffcError(said, fix="compile again") from error
    check_config(family, model["config"], "the config in the manifest")
    return family


def components() -> tuple[str, ...]:
    """The names that backbones have in pipelines: transformer, unet."""
    return tuple(sorted({family.component for family in FAMILIES.values()}))


def backbone_among(classes: Mapping[str, str]) -> str | None:
    """The component that is the backbone of a pipeline; `classes` names the class of each that it has.

    One of another name than usual is known by its class: Stable Cascade's "prior" is a StableCascadeUNet.
    """
    named = [name for name in components() if name in classes]
    return next(iter(named or [name for name, kind in classes.items() if _BACKBONE.search(kind)]), None)


def family_of(config: Config, place: object) -> Family:
    """The family of a backbone with that config.json, which was read from `place`.

    Raises UnsupportedError that says what keeps it from each family of its class, or which classes are known.
    """
    kind = config.get("_class_name")
    known_one = known_family(config)
    if known_one is not None:
        return known_one
    same_class = [family for family in FAMILIES.values() if family.backbone_class == kind]
    asked = [entry for family in same_class for entry in _differing(family, config)]
    which = (
        f" with {', '.join(f'{key}={config.get(key)!r}' for key in dict.fromkeys(asked))}" if asked else ""
    )
    known = ", ".join(_described(family) for family in FAMILIES.values())
    raise UnsupportedError(
        f"{place}: no support for a backbone of class {kind}{which}. Known: {known}"
        f"{plugins.unusable_ones(_GROUP, 'model family')}",
        fix="give the pipeline (its folder with model_index.json, or the object), off whose calls diffc reads what the"
        " backbone takes",
    )


def known_family(config: Config) -> Family | None:
    """The family of `FAMILIES` that a backbone with that config.json belongs to; None where there is none."""
    same_class = (f for f in FAMILIES.values() if f.backbone_class == config.get("_class_name"))
    return next((family for family in same_class if not _differing(family, config)), None)


def _differing(family: Family, config: Config) -> list[str]:
    """The entries of a config.json that are not as the family requires."""
    return [key for key, value in family.requires.items() if config.get(key) != value]


def _described(family: Family) -> str:
    needs = "".join(f" with {key}={value!r}" for key, value in family.requires.items())
    return f"{family.backbone_class}{needs} ({family.name})"
