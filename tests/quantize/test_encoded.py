"""Prompts encoded up to the backbone's first call, and replayed without the encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffc.quantize.encoded import EncodedPrompts


class Pipe:
    """Encodes a prompt twice, as pipelines with true guidance do, and calls a control net beside the backbone."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.text_encoder, self.control = nn.Linear(3, 4), nn.Linear(4, 4)
        self.transformer, self.safety = nn.Linear(4, 4), nn.Linear(1, 1)
        self._execution_device, self.encoded = torch.device("cpu"), 0

    @property
    def components(self) -> dict[str, Any]:
        return {**{n: m for n, m in vars(self).items() if isinstance(m, nn.Module)}, "tokenizer": "words"}

    def encode_prompt(self, x: torch.Tensor) -> tuple[list[torch.Tensor], None]:
        self.encoded += 1
        return [self.text_encoder(x), self.text_encoder(-x)[:1]], None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        (one, other), nothing = self.encode_prompt(x)
        (_, last), _ = self.encode_prompt(2 * x)
        assert nothing is None
        y = self.control(one) + last
        return self.transformer(self.transformer(y) + other)


def test_a_call_without_encoders_is_the_call_with_them(tmp_path: Path) -> None:
    pipe: Any = Pipe()
    batches = [torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) for n in (2, 1)]
    with torch.no_grad():
        expected = [pipe(x) for x in batches]
    encoded, done = EncodedPrompts(tmp_path / "a"), []
    assert encoded.encoders is None
    calls = [lambda x=x: {"x": x} for x in batches]  # type: ignore[misc]
    found = encoded.encode(pipe, "transformer", calls, lambda *at: done.append(at))
    assert (found, done) == (("text_encoder",), [(1, 2), (2, 2)])
    pipe.text_encoder.to("meta")
    pipe.encoded = 0
    with torch.no_grad():
        for number in (1, 0):
            with encoded.replayed(pipe, number):
                assert torch.equal(pipe(batches[number]), expected[number])
    assert pipe.encoded == 0
    assert (
        EncodedPrompts(tmp_path / "a").encode(pipe, "transformer", calls, print) == found
    )  # no encoder runs
    pipe.text_encoder = nn.Linear(3, 4)
    pipe(batches[0])
    assert pipe.encoded == 2  # the pipeline is as before
