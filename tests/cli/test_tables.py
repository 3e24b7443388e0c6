"""The tables of the command line: what a newcomer reads of sizes and shapes."""

from __future__ import annotations

from typing import Any

from diffc.cli.tables import file_rows, lora_lines, made_for, megabytes


def test_sizes_and_shapes_are_for_people() -> None:
    assert megabytes(2_500_000).strip() == "2.50 MB"
    assert megabytes(11.9e9).strip() == "11.90 GB"
    small, best, large = ({"batch": b, "height": 64 * b, "width": 64, "text": 77} for b in (1, 2, 4))
    manifest: dict[str, Any] = {"profile": {"minimum": small, "optimum": best, "maximum": large}}
    assert made_for(manifest) == "Made for batch 1 to 4 (best 2), 64x64 to 256x64 (best 128x64) px, 77 tokens"
    inputs = [{"name": "x", "dims": ["batch", 16, "rows"]}, {"name": "t", "dims": ["batch"]}]
    ranges = {"x": {"min": [1, 16, 8], "opt": [2, 16, 8], "max": [4, 16, 32]}}
    ranges["t"] = {end: sizes[:1] for end, sizes in ranges["x"].items()}
    of_a_file = {"inputs": inputs, "profile": [{"inputs": ranges}]}
    assert made_for(of_a_file) == "Made for batch 1:2:4, rows 8:8:32"
    assert made_for({"inputs": inputs, "profile": []}) == "Made for batch any, rows any"
    assert made_for({"inputs": [], "profile": []}) == "Made for the sizes of the ONNX file, all fixed"
    film = {name: shape | {"frames": 9 * shape["batch"]} for name, shape in manifest["profile"].items()}
    assert "9 to 36 (best 18) frames" in made_for({"profile": film})
    manifest |= {
        "files": {
            "model.onnx": {"bytes": 1},
            "model.onnx_data": {"bytes": 50},
            "engines/a.engine": {"bytes": 60},
        },
        "model": {"bytes": 200},
        "engines": [{"file": "engines/a.engine", "sms": [89, 120]}],
    }
    first, weights, engine = file_rows(manifest)
    assert first.split()[0] == "model.onnx"
    assert "25% of the original's" in weights
    assert engine.endswith("for SM89 (RTX 40, L40), SM120 (RTX 50), not run here")


def test_loras_in_a_manifest_have_a_line_each() -> None:
    lora = {"file": "a.safetensors", "weight": 0.8, "layers": {"LoRA": 12, "difference": 2}}
    manifest = {"model": {"loras": [lora]}, "lora_slots": {"rank": 16, "layers": {"a": [1, 2, 1]}}}
    first, second = lora_lines(manifest)
    assert first == "LoRA in the weights: a.safetensors (weight 0.8), 12 LoRA, 2 difference layers"
    assert second == "LoRA slots: 1 layers, up to rank 16"
    assert lora_lines({"model": {}}) == []
