"""The shapes that an artifact was compiled for, as shapes of a model's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffc.backends.profile import Profile
from diffc.backends.signature import Signature
from diffc.models.family import Family
from diffc.models.spec import Shape


def profile_of(manifest: Mapping[str, Any], family: Family, signature: Signature) -> Profile:
    """The profile of the compile as shapes of the inputs of `signature`, which may be those of one cached model."""
    stated = manifest["profile"]
    bounds = [family.sizes(Shape(**stated[name])) for name in ("minimum", "optimum", "maximum")]
    return Profile.of_dims({value.name: value.dims for value in signature.inputs}, *bounds)
