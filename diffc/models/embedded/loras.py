"""LoRAs that come with diffc, to try them on the embedded models: known by name, small files of the package."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "data" / "loras"
EMBEDDED_LORAS = {f"digits-{style}": FOLDER / f"{style}.safetensors" for style in ("inverted", "slanted")}
"""Both are for digits-sd3: light digits on a dark page, and digits that lean over (`tools/train/lora.py`)."""
