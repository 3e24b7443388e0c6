"""LPIPS on a random AlexNet against torchmetrics' own, which takes the same convolutions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torchmetrics.functional.image import lpips as theirs

from diffc.errors import DiffcError
from diffc.quality.metrics.entries import as_tensor
from diffc.quality.metrics.lpips import Lpips
from tests.quality.metrics.pictures import picture


def alexnet(folder: Path) -> Path:
    generator = torch.Generator().manual_seed(2)
    shapes = {
        0: (64, 3, 11, 11),
        3: (192, 64, 5, 5),
        6: (384, 192, 3, 3),
        8: (256, 384, 3, 3),
        10: (256, 256, 3, 3),
    }
    weights = {}
    for number, shape in shapes.items():
        size = (shape[1] * shape[2] * shape[3]) ** 0.5
        weights[f"features.{number}.weight"] = torch.randn(shape, generator=generator) / size * 1.4
        weights[f"features.{number}.bias"] = torch.randn(shape[0], generator=generator) * 0.1
    weights["classifier.1.weight"] = torch.zeros(1)
    torch.save(weights, folder / "alexnet.pth")
    return folder / "alexnet.pth"


def test_distances_are_those_of_torchmetrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Lpips(alexnet(tmp_path))
    net = nn.Sequential(*ours._layers, nn.MaxPool2d(3, 2))
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda *_: net)
    expected = theirs._LPIPS(pretrained=True, net="alex", pnet_rand=False)
    one, other = as_tensor(picture(1, (80, 96))), as_tensor(picture(2, (80, 96)))
    found = ours.distance(one, other)
    with torch.no_grad():
        assert found == pytest.approx(float(expected(one, other, normalize=True)), rel=1e-4)
    assert found > 0.01
    assert ours.distance(one, one) == 0


def test_another_network_is_refused(tmp_path: Path) -> None:
    torch.save({"features.0.weight": torch.ones(1)}, tmp_path / "x.pth")
    with pytest.raises(DiffcError, match=r"not torchvision's AlexNet[\s\S]*download"):
        Lpips(tmp_path / "x.pth")
