"""Intervals that hold what they should, and the Frechet distance of torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from diffc.quality.metrics.statistics import difference_of, frechet, mean_of


def test_intervals_hold_the_mean_in_19_of_20_cases() -> None:
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(200):
        found = mean_of(list(rng.normal(2.0, 1.0, 60)))
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 2.0 <= found.high
    assert 180 <= held <= 198
    found = mean_of(list(rng.normal(2.0, 1.0, 400)))
    assert found.error == pytest.approx(1 / 20, rel=0.1)
    assert mean_of([1.5]).error is None


def test_paired_differences_are_narrower_than_two_means() -> None:
    rng = np.random.default_rng(4)
    base = rng.normal(0, 1, 100)
    better = base + 0.1 + rng.normal(0, 0.05, 100)
    found, alone = difference_of(list(better), list(base)), mean_of(list(better))
    assert found.low is not None
    assert alone.low is not None
    assert found.high is not None
    assert alone.high is not None
    assert found.low > 0
    assert (found.high - found.low) < 0.1 * (alone.high - alone.low)


def test_the_frechet_distance_is_that_of_torchmetrics() -> None:
    class Features(torch.nn.Module):
        num_features = 6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1).float()

    rng = np.random.default_rng(5)
    mix = rng.normal(size=(6, 6))
    one, other = rng.normal(size=(80, 6)) @ mix, rng.normal(0.3, 1.2, size=(90, 6))
    metric = FrechetInceptionDistance(feature=Features(), input_img_size=(6, 1, 1), normalize=False)
    metric.set_dtype(torch.float64)
    metric.orig_dtype = torch.float64  # what update() notes
    for real, values in ((True, other), (False, one)):
        features = torch.from_numpy(values)
        sums, products = features.sum(0), features.T @ features
        for name, value in (
            ("sum", sums),
            ("cov_sum", products),
            ("num_samples", torch.tensor(len(features))),
        ):
            setattr(metric, f"{'real' if real else 'fake'}_features_{name}", value)
    assert frechet(one, other) == pytest.approx(float(metric.compute()), rel=1e-6)
    assert frechet(one, one) == pytest.approx(0, abs=1e-6)
