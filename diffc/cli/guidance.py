"""The option of the guidance scale, which commands that paint for calibration or training share."""

from __future__ import annotations

from typing import Any

import typer


def guidance_option(panel: str) -> Any:
    """`--guidance`, listed in `panel` of a command's help."""
    return typer.Option(
        "--guidance",
        "--guidance-scale",
        metavar="SCALE",
        help="Guidance scale.",
        min=0,
        show_default="the family's; 0 for turbo models",
        rich_help_panel=panel,
    )
