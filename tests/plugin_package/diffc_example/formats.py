"""int8_linear: int8 for linear layers only."""

from __future__ import annotations

from dataclasses import replace

from diffc.quantize.formats import FORMATS

INT8_LINEAR = replace(
    FORMATS["int8"], name="int8_linear", summary="int8, with convolutions left as they are", layers="linear"
)
