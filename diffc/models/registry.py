"""The families by name."""

from __future__ import annotations

from diffc.errors import unknown
from diffc.models.families.flux import FLUX
from diffc.models.families.sd3 import SD3
from diffc.models.families.sdxl import SDXL
from diffc.models.spec import ModelSpec

SPECS: dict[str, ModelSpec] = {spec.family: spec for spec in (SD3, FLUX, SDXL)}


def find_spec(family: str) -> ModelSpec:
    """The family's spec. Raises DiffcError that lists the known families."""
    if family not in SPECS:
        raise unknown("model family", family, SPECS)
    return SPECS[family]
