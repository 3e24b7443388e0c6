"""A compile of several formats asks for the calibration that has them, and for what each of them needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffc.compile.plan import check
from diffc.compile.request import CompileRequest
from diffc.errors import DiffcError
from diffc.quantize.checkpoint import Checkpoint


def test_a_mix_is_refused_without_its_calibration_and_where_a_format_does_not_run(tmp_path: Path) -> None:
    request = {"model": "tiny-sd3", "output": tmp_path / "out", "format": "mixed", "targets": "trt-rtx"}
    with pytest.raises(DiffcError, match="takes the calibration that `diffc mix` wrote"):
        check(CompileRequest(**request, sms=89))
    settings = {"num_bits": 8, "axis": None, "block_sizes": None, "type": "static"}
    settings |= {"unsigned": False, "narrow_range": False}
    amax = {"a.input_quantizer": np.float32(1.5)[None]}
    formats = {"steps": 2, "formats": ["nvfp4", "fp8"]}
    Checkpoint("sd3", "mixed", {}, {"a.input_quantizer": settings}, amax, calibration=formats).save(
        tmp_path / "c"
    )
    with pytest.raises(DiffcError, match="nvfp4"):
        check(CompileRequest(**request, sms=89, from_checkpoint=tmp_path / "c"))
    plan = check(CompileRequest(**request, sms=120, from_checkpoint=tmp_path / "c"))
    assert (plan.format.name, plan.calibrates, plan.runs_pipeline) == ("mixed", False, False)
