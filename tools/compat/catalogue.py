"""All probes of `tools.compat`, by section. Importing the modules of probes is what registers them."""

from __future__ import annotations

from tools.compat import domains, formats, operators, quantizers
from tools.compat.probes import PROBES, Probe

MODULES = (domains, formats, operators, quantizers)
SECTIONS = (
    *("Opsets", "Types", "Matrix products", "Attention", "Norms", "Activations and others", "com.microsoft"),
    *("Functions", "Q/DQ", "TensorRT's operators", "Standard blocks", "INT4", "NVFP4", "MXFP8"),
    *("FP8 attention", "What the engine keeps"),
)


def all_probes() -> dict[str, Probe]:
    """All probes by name, in the order of the sections."""
    return dict(sorted(PROBES.items(), key=lambda item: SECTIONS.index(item[1].section)))
