"""Cache diffusion: block outputs of one denoising step used again in later ones, by a plan that is data."""

from diffc.cache.plan import CachePlan, Entry, Steps
from diffc.cache.presets import PRESETS, preset
from diffc.cache.resolve import Group, ResolvedCache, resolve
from diffc.cache.torch_apply import AppliedCache, apply

__all__ = [
    "PRESETS",
    "AppliedCache",
    "CachePlan",
    "Entry",
    "Group",
    "ResolvedCache",
    "Steps",
    "apply",
    "preset",
    "resolve",
]
