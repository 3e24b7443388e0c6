"""LoRAs that come with diffc, to try them on the embedded models: known by name, small files of the package."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "data" / "loras"
EMBEDDED_LORAS = {"digits-inverted": FOLDER / "inverted.safetensors"}
"""digits-inverted: for digits-sd3, light digits on a dark page (`tools/train/lora.py`)."""
