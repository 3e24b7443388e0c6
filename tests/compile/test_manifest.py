"""What a manifest says of the calibration."""

from __future__ import annotations

import numpy as np

from diffc.compile.manifest import described_checkpoint
from diffc.quantize.checkpoint import Checkpoint
from passes.weights.sources import keep


def test_a_manifest_says_that_weights_were_trained_and_formats_mixed() -> None:
    plain = Checkpoint("sd3", "fp8", {}, {}, {}, calibration={"steps": 4})
    assert described_checkpoint(None) == described_checkpoint(plain) == {}
    weights = {name: keep(np.ones(3, np.float32)) for name in ("a.weight", "b.weight")}
    trained = Checkpoint("sd3", "fp8", {}, {}, {}, weights=weights)
    assert described_checkpoint(trained) == {"checkpoint": {"trained_weights": 2}}
    several = Checkpoint("sd3", "mixed", {}, {}, {}, calibration={"formats": ["fp8", "nvfp4"]})
    assert described_checkpoint(several) == {"checkpoint": {"formats": ["fp8", "nvfp4"]}}
