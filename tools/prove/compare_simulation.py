"""Holds NVFP4 and MXFP8 simulation against ModelOpt's CUDA kernels, on a machine with an NVIDIA GPU.

    python -m tools.prove.compare_simulation OUT.npz

Needs nvidia-modelopt, triton, nvcc and compute capability 8.9 or later. Prints how many results differ in any bit, by
case and for large random tensors, and writes the inputs and ModelOpt's
results: that file, as tests/data/simulation.npz, is what tests/quantize/test_simulate.py reads.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffc.quantize.simulate import mxfp8_fake_quant, nvfp4_fake_quant

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((6, 64), (3, 2, 48), (5, 40), (4, 7), (2, 3, 2, 36), (9, 112))
E2M1_TIES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
LARGE = 1 << 26
"""Elements of a large random tensor."""


@dataclass(frozen=True)
class Case:
    """One tensor to quantize; `amax` only for NVFP4."""

    group: str
    x: Tensor
    amax: Tensor | None

    @property
    def format(self) -> str:
        """Which of the two simulations it is for."""
        return "mxfp8" if self.amax is None else "nvfp4"


def main() -> int:
    """Compare and write; 0 also when results differ, as the output says how many."""
    parser = argparse.ArgumentParser(description="Compare diffc's block simulation with ModelOpt's kernels.")
    parser.add_argument("output", type=Path, help="the npz to write")
    output: Path = parser.parse_args().output
    cases = list(all_cases())
    results = [modelopt(case) for case in cases]
    report_cases(cases, results)
    save(output, cases, results)
    for dtype in DTYPES:
        for format in ("nvfp4", "mxfp8"):
            report_large(format, dtype)
    return 0


def modelopt(case: Case) -> Tensor:
    """What ModelOpt's TensorQuantizer would make of the case on the GPU, on the CPU again."""
    from modelopt.torch.quantization.tensor_quant import dynamic_block_quant

    x = case.x.cuda()
    if case.amax is None:
        y: Tensor = dynamic_block_quant(x, 32, None, None, (4, 3), (8, 0))
    else:
        y = dynamic_block_quant(x, 16, case.amax.cuda(), None, (2, 1), (4, 3))
    return y.cpu()


def simulated(case: Case) -> Tensor:
    """What diffc makes of it, on the device of `case.x`."""
    return mxfp8_fake_quant(case.x) if case.amax is None else nvfp4_fake_quant(case.x, case.amax)


def bits(x: Tensor) -> Tensor:
    """The integers of the same width: -0 is not 0, and NaN equals itself."""
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def differing(mine: Tensor, theirs: Tensor) -> Tensor:
    """Where results differ in any bit, other than in the payload of NaN; on the CPU."""
    mine, theirs = mine.cpu(), theirs.cpu()
    return (bits(mine) != bits(theirs)) & ~(mine.isnan() & theirs.isnan())


def described(case: Case, differ: Tensor) -> str:
    """How many differ, and how many of those for each of the known reasons (see tests/data/README.md)."""
    x, differ = case.x.cpu(), differ.cpu()
    counts = {"of zeros": differ & (x == 0)}
    if case.amax is not None and differ.any():
        counts |= beside_ties(x, case.amax.cpu(), differ)
    known = torch.stack(list(counts.values())).any(0)
    reasons = [f"{int(where.sum())} {reason}" for reason, where in counts.items() if where.any()]
    other = [f"{int((differ & ~known).sum())} OTHERS"] if (differ & ~known).any() else []
    return " ".join([f"{int(differ.sum())} of {differ.numel()} differ:", ", ".join(reasons + other)])


def beside_ties(x: Tensor, amax: Tensor, differ: Tensor) -> dict[str, Tensor]:
    """Which differing elements of NVFP4 an approximate division explains: the block's scale, or x over it."""
    rows = torch.nn.functional.pad(x.float().reshape(-1, x.shape[-1]), (0, -x.shape[-1] % 16)).abs()
    blocks = rows.reshape(len(rows), -1, 16)
    here = torch.nn.functional.pad(differ.reshape(-1, x.shape[-1]), (0, -x.shape[-1] % 16)).reshape(
        blocks.shape
    )
    chosen, inside = blocks[here.any(-1)], here[here.any(-1)]
    scale = amax.amax() * (1 / 2688)
    ratio = chosen.amax(-1, keepdim=True).double() / (6 * scale)
    steps = ratio.float().clamp(max=448).to(torch.float8_e4m3fn).float() * scale
    quotient = chosen.double() / torch.where(steps >= 1e-5, steps, 1.0)
    every = torch.arange(1, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    of_scale = is_beside(ratio, (every[1:] + every[:-1]) / 2).expand_as(chosen) & inside
    of_values = is_beside(quotient, E2M1_TIES) & inside & ~of_scale
    found = {}
    for reason, where in (
        ("beside ties of E2M1", of_values),
        ("in blocks with a scale beside a tie", of_scale),
    ):
        whole = torch.zeros_like(here)
        whole[here.any(-1)] = where
        found[reason] = whole.flatten(1)[:, : x.shape[-1]].reshape(x.shape)
    return found


def is_beside(value: Tensor, ties: Tensor) -> Tensor:
    """Whether a value is within what `div.full.f32` and a rounding may be off, 4 * 2^-24, of one of the ties."""
    return (value[..., None] / ties - 1).abs().amin(-1) <= 4 * 2.0**-24


def report_cases(cases: list[Case], results: list[Tensor]) -> None:
    """A line for every case with a difference, and how many have none."""
    equal = 0
    for case, result in zip(cases, results, strict=True):
        differ = differing(simulated(case), result)
        equal += not differ.any()
        if differ.any():
            print(case.format, case.group, case.x.dtype, described(case, differ))
    print(f"{equal} of {len(cases)} cases are equal in every bit")


def report_large(format: str, dtype: torch.dtype) -> None:
    """Large normal tensors of several spreads, simulated on the GPU and, the first, on the CPU as well."""
    torch.manual_seed(17)
    for spread in (1.0, 0.02, 0.37, 5.3):
        x = (torch.randn(LARGE // 4096, 4096, device="cuda") * spread).to(dtype)
        case = Case("large", x, x.abs().amax().float() if format == "nvfp4" else None)
        result, mine = modelopt(case), simulated(case)
        print(format, "large", dtype, spread, described(case, differing(mine, result)))
        if spread == 1.0:
            on_cpu = Case("large", x.cpu(), None if case.amax is None else case.amax.cpu())
            same = torch.equal(bits(simulated(on_cpu)), bits(mine.cpu()))
            print("    the CPU's result is", "the GPU's" if same else "ANOTHER")


def save(path: Path, cases: list[Case], results: list[Tensor]) -> None:
    """Tensors as integers, since numpy has no bfloat16; `cases` is JSON: format, group, dtype and shape."""
    arrays: dict[str, Any] = {}
    described_as = []
    for number, (case, result) in enumerate(zip(cases, results, strict=True)):
        arrays[f"x{number}"] = bits(case.x).numpy()
        arrays[f"y{number}"] = bits(result).numpy()
        if case.amax is not None:
            arrays[f"amax{number}"] = case.amax.numpy()
        described_as.append({"format": case.format, "group": case.group, "dtype": str(case.x.dtype)[6:]})
    versions = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, **modelopt_versions()}
    np.savez_compressed(path, cases=json.dumps({"made with": versions, "cases": described_as}), **arrays)


def modelopt_versions() -> dict[str, str]:
    """Versions of what the kernels come from."""
    from importlib.metadata import version

    return {name: version(name) for name in ("nvidia-modelopt", "triton")}


def all_cases() -> Iterator[Case]:
    """Every group in every type, seeded."""
    generator = torch.Generator().manual_seed(5)
    for dtype in DTYPES:
        for group, x in inputs(dtype, generator):
            yield Case(group, x, None)
            for amax in amaxes(group, x):
                yield Case(group, x, amax)
        for group, x, amax in nvfp4_ties(dtype, generator):
            yield Case(group, x, amax)
        for group, x in mxfp8_edges(dtype, generator):
            yield Case(group, x, None)


def inputs(dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Tensors for both formats."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    top = torch.finfo(dtype).max
    for shape in SHAPES:
        yield "normal", normal(*shape).to(dtype)
        yield "heavy tails", (normal(*shape) * torch.exp(2 * normal(*shape))).clamp(-top, top).to(dtype)
    # Block scales from far below to far above 1e-5, where the NVFP4 kernel takes 1 instead.
    small = normal(12, 64) * 10.0 ** (
        -7 + 4 * torch.rand(12, 64 // 16, generator=generator).repeat_interleave(16, 1)
    )
    yield "tiny", small.to(dtype)
    zeros = torch.where(torch.rand(6, 48, generator=generator) < 0.3, normal(6, 48), 0.0)
    zeros[:2] = 0.0
    yield "zeros", torch.copysign(zeros, normal(6, 48)).to(dtype)
    yield "huge", ((torch.rand(5, 80, generator=generator) * 2 - 1) * top).to(dtype)
    special = normal(6, 64)
    special[1, 3], special[2, 17], special[2, 18], special[4, 40] = torch.inf, -torch.inf, 1e4, torch.inf
    yield "infinity", special.to(dtype)
    special = normal(6, 64)
    special[1, 3], special[2, 17], special[4, 32:] = torch.nan, -torch.nan, torch.nan
    yield "nan", special.to(dtype)


def amaxes(group: str, x: Tensor) -> Iterator[Tensor]:
    """That of the tensor; for normal ones also a smaller, a larger one, 0, and one per row."""
    largest = x.float().nan_to_num(nan=0, posinf=1, neginf=1).abs().amax()
    yield largest
    if group == "normal" and x.shape == SHAPES[0]:
        yield from (largest * 0.1, largest * 37.7, torch.tensor(0.0))
        yield x.float().abs().amax(1, keepdim=True)


def nvfp4_ties(dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[str, Tensor, Tensor]]:
    """x / b exactly between two E2M1 values, and block amax / (6 * s2) exactly between two E4M3 values."""
    every = torch.arange(8, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    scales = every[torch.randperm(len(every), generator=generator)[:48]]
    for s2 in (2.0**-6, 2.0**-3):
        blocks = E2M1_TIES[torch.randint(7, (48, 16), generator=generator)] * scales[:, None] * s2
        blocks[:, 0] = 6 * scales * s2
        sign = torch.randn(48, 16, generator=generator)
        x = torch.copysign(blocks, sign).reshape(12, 64).to(dtype)
        yield "E2M1 ties", x, torch.tensor(2688 * s2)
        middle = (every[1:] + every[:-1])[torch.randperm(len(every) - 1, generator=generator)[:48]] / 2
        blocks = torch.rand(48, 16, generator=generator) * 6 * middle[:, None] * s2
        blocks[:, 5] = 6 * middle * s2
        yield (
            "E4M3 ties of scales",
            torch.copysign(blocks, sign).reshape(12, 64).to(dtype),
            torch.tensor(2688 * s2),
        )


def mxfp8_edges(dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Block amax at and beside 448 * 2^e; x / 2^e between two E4M3 values; subnormal numbers."""
    info = torch.finfo(dtype)
    exponent = torch.randint(-20, 7, (24, 1), generator=generator)
    edge = 448 * 2.0**exponent
    step = edge * info.eps * torch.randint(-2, 3, (24, 1), generator=generator)
    # Far below the amax too: E4M3 is a float, only its subnormal values tell one exponent from the next.
    x = (
        torch.rand(24, 32, generator=generator)
        * edge
        / 2.0 ** torch.randint(18, (24, 32), generator=generator)
    )
    x[:, 9:10] = edge + step
    yield "powers of two", x.reshape(6, 128).to(dtype)
    every = torch.arange(1, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = ((every[1:] + every[:-1]) / 2)[torch.randint(len(every) - 1, (24, 32), generator=generator)]
    middle[:, 0] = 448
    x = torch.copysign(middle * 2.0**exponent, torch.randn(24, 32, generator=generator))
    yield "E4M3 ties", x.reshape(6, 128).to(dtype)
    span = 2.0 ** torch.randint(0, 12, (24, 1), generator=generator)
    yield (
        "subnormal",
        (torch.randn(24, 32, generator=generator) * info.tiny * span / 64).reshape(6, 128).to(dtype),
    )


if __name__ == "__main__":
    raise SystemExit(main())
