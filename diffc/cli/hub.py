"""The options that say which files of a model are read: of the Hugging Face hub, and variants of any folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PANEL = "Models of the Hugging Face hub, and variants"

Revision = Annotated[
    str | None,
    typer.Option(
        "--revision",
        metavar="REVISION",
        help="Branch, tag or commit.",
        show_default="the main branch",
        rich_help_panel=PANEL,
    ),
]
Variant = Annotated[
    str | None,
    typer.Option(
        "--variant",
        metavar="WORD",
        help="Which weight files to read, such as fp16 for model.fp16.safetensors.",
        show_default="plain names, or the variant that is there",
        rich_help_panel=PANEL,
    ),
]
Subfolder = Annotated[
    str,
    typer.Option(
        "--subfolder",
        metavar="DIR",
        help="Folder of the pipeline or backbone in the model.",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
Token = Annotated[
    str | None,
    typer.Option(
        "--token",
        metavar="TOKEN",
        help="For gated and private models.",
        show_default="the one of `hf auth login`",
        rich_help_panel=PANEL,
    ),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir",
        metavar="DIR",
        help="Cache of downloads.",
        show_default="the hub's",
        rich_help_panel=PANEL,
    ),
]
