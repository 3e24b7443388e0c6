"""The first lane compiles no backbone: what does so without its mark fails, whatever stands around the call."""

from __future__ import annotations

import os

import pytest
import torch
from diffusers import SD3Transformer2DModel

from diffc.models.embedded import tiny
from tests.conftest import Cells
from tests.lanes import MARK


def backbone() -> torch.nn.Module:
    with torch.device("meta"):
        return SD3Transformer2DModel(**(tiny.SD35 | {"num_layers": 1}))


def careless() -> None:
    try:
        torch.export.export(backbone(), ())
    except Exception as error:
        raise AssertionError("the guard was caught") from error


def test_a_backbone_that_is_traced_here_fails_the_test() -> None:
    """Even where the code around the exporter catches every exception."""
    with pytest.raises(pytest.fail.Exception, match="traces a backbone and is in the first lane"):
        careless()


def test_layers_may_be_traced() -> None:
    program = torch.export.export(torch.nn.Linear(3, 2), (torch.ones(1, 3),))
    assert set(program.state_dict) == {"weight", "bias"}


@pytest.mark.compiles
def test_who_is_marked_may_trace() -> None:
    with pytest.raises(AssertionError, match="the guard was caught"):  # torch misses the inputs
        careless()


@pytest.fixture
def indirect(compiled: Cells) -> Cells:
    return compiled


@pytest.mark.usefixtures("indirect")
def test_the_mark_comes_with_the_fixtures_of_fixtures(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker(MARK)


def test_the_groups_hold(request: pytest.FixtureRequest) -> None:
    """Tests of a file stay in one process, or each process makes the compiles of the file again.

    pytest-xdist 3.8 writes the group into the name of the test; with pytest 9.2 it does so in vain.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("one process")
    assert request.node.nodeid.endswith("@tests/test_lanes.py")
