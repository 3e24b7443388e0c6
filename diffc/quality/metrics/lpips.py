"""LPIPS (Zhang et al. 2018, version 0.1 with AlexNet): how different two pictures look to a network.

The five convolutions of AlexNet are written out, since torchvision, which has them, must fit the installed torch
exactly. Its weights come from a file; the layers on top lie in torchmetrics.
"""

from __future__ import annotations

from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from diffc.errors import DiffcError

ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_TAPS = (2, 5, 8, 10, 12)
"""After these layers of AlexNet's features, each behind a ReLU, the two pictures are compared."""


class Lpips:
    """The network and what is on top of it, from torchvision's AlexNet file; on the CPU or a GPU."""

    def __init__(self, alexnet: Path, device: str = "cpu", heads: Path | None = None) -> None:
        self._layers = features(_read(alexnet)).eval().to(device)
        file = (
            heads or Path(str(files("torchmetrics"))) / "functional" / "image" / "lpips_models" / "alex.pth"
        )
        stored = _read(file)
        self._heads = [stored[f"lin{number}.model.1.weight"].to(device) for number in range(len(_TAPS))]
        self._shift, self._scale = (
            torch.tensor(v, device=device).reshape(1, 3, 1, 1) for v in (_SHIFT, _SCALE)
        )
        self._device = device

    @torch.no_grad()
    def distance(self, image: Tensor, reference: Tensor) -> float:
        """0 for equal pictures [1, 3, H, W] in 0..1; both of one size, of at least 32 pixels."""
        total = 0.0
        for one, other, head in zip(
            self._looked_at(image), self._looked_at(reference), self._heads, strict=True
        ):
            total += float(nn.functional.conv2d((one - other).square(), head).mean())
        return total

    def _looked_at(self, image: Tensor) -> list[Tensor]:
        """What the network sees at each tap, every pixel a unit vector."""
        x = (image.to(self._device) * 2 - 1 - self._shift) / self._scale
        found = []
        for begin, end in pairwise((0, *_TAPS)):
            x = self._layers[begin:end](x)
            found.append(x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return found


def features(weights: dict[str, Tensor]) -> nn.Sequential:
    """AlexNet's features (Krizhevsky 2014) up to the fifth ReLU, filled."""
    relu = nn.ReLU
    layers = nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2),
        relu(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        relu(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        relu(),
        nn.Conv2d(384, 256, 3, padding=1),
        relu(),
        nn.Conv2d(256, 256, 3, padding=1),
        relu(),
    )
    prefix = "features."
    own = {name.removeprefix(prefix): v for name, v in weights.items() if name.startswith(prefix)}
    try:
        layers.load_state_dict(own)
    except RuntimeError as error:
        raise DiffcError(f"this is not torchvision's AlexNet: {error}", fix=f"download {ALEXNET}") from error
    return layers


def _read(file: Path) -> dict[str, Tensor]:
    import pickle

    try:
        content: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise DiffcError(f"cannot read {file}: {error}", fix=f"download {ALEXNET}") from error
    return content
