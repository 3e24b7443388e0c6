"""The section of docs/quality.md on videos: its table and its picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diffc.models.embedded.digits_video import DIRECTIONS, FRAMES, prompt
from diffc.quality.videos import asked_videos
from tools.pages.quality_table import POINTS, TORCH

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURE = "quality-digits-video.png"
SHOWN = 7
"""The number of the video whose frames the picture shows."""
COLUMNS = (
    "format",
    "frames read as asked",
    "points lost",
    "limit",
    "move as asked",
    "PSNR, dB",
    "SSIM",
    "steps reused",
)
BEGIN, END = "<!-- videos: begin -->", "<!-- videos: end -->"
Rows = Sequence[dict[str, Any]]
HEAD = f"""\
## Videos

`python -m tools.pages.quality_video --videos {{videos}} --steps {{steps}} --json FILE --resume
--write docs/quality.md`: digits-video ([digits.md](digits.md)) paints {{videos}} videos of {FRAMES} frames
in {{steps}} steps, each digit in each of {len(DIRECTIONS)} directions in turn, once in torch and once with each
compiled backbone, as the images above.

*Frames read as asked*: the classifier sees the part of each frame around its ink. *Move as asked*: the share of videos
whose ink goes where the prompt says, or stays. *Points lost* are hundredths of the frames, PSNR a mean over the
videos, both against torch. A cell with a cache plan uses its inner blocks again in the share of steps that it says.
The first and the last of the six blocks stay unquantized in every format, as they do in each LTX-Video.
"""


def section(rows: Rows, videos: int, steps: int) -> str:
    """The text between the marks."""
    reference = next((row["right"] for row in rows if row["cell"] == TORCH and not row["error"]), 1.0)
    lines = [*HEAD.format(videos=videos, steps=steps).splitlines(), "", "| " + " | ".join(COLUMNS) + " |"]
    lines += ["|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(_cells_of(row, reference)) + " |" for row in rows]
    lines += ["", f"Frames of {prompt(*asked_videos(SHOWN + 1)[SHOWN])!r}, each row a format:", ""]
    return "\n".join([*lines, f"![digits-video: torch, each format and a cache plan]({PICTURE})"]) + "\n"


def _cells_of(row: dict[str, Any], reference: float) -> tuple[str, ...]:
    """One row as text; `reference` is the share that the unquantized model has right."""
    if row["error"]:
        return row["cell"], *[""] * (len(COLUMNS) - 2), "failed: " + row["error"].splitlines()[0]
    shares = f"{row['right']:.1%}", f"{row['moved']:.0%}"
    if row["cell"] == TORCH:
        return "torch, float32", shares[0], "", "", shares[1], "", "", ""
    limit = POINTS.get(row["cell"].partition(",")[0].removesuffix("+mha"), 2)
    near = "equal" if math.isinf(row["psnr"]) else f"{row['psnr']:.1f}"
    points = f"{100 * (reference - row['right']) + 0.0:.1f}"
    reused = f"{row['reused']:.0%}" if row["reused"] else ""
    return row["cell"], shares[0], points, str(limit), shares[1], near, f"{row['ssim']:.3f}", reused


def picture(rows: Rows) -> Image:
    """A row of frames for each cell."""
    from diffc.quality.strips import decode, sheet

    strips = [(row["cell"], decode(row["strip"])) for row in rows if not row["error"]]
    return sheet([(name, strip.resize((strip.width * 2, strip.height * 2), 0)) for name, strip in strips])


def section_of(page: str) -> str:
    """What a page has between the marks; empty where it has none."""
    return page.partition(BEGIN)[2].partition(END)[0].strip("\n")


def with_section(page: str, text: str) -> str:
    """The page with `text` between the marks, at its end where it has none; without marks where the text is empty."""
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2].strip("\n")
    parts = [before.rstrip("\n"), f"{BEGIN}\n{text.strip(chr(10))}\n{END}" if text else "", after]
    return "\n\n".join(part for part in parts if part) + "\n"
