"""Tokenizers for transformers 4, which optimum-onnx needs, from the files that transformers 4 or 5 wrote."""

from __future__ import annotations

from pathlib import Path

# What the slow class of transformers 4 reads. transformers 5 has one class under that name and writes tokenizer.json.
_SLOW = {"CLIPTokenizer": ("vocab.json", "merges.txt"), "T5Tokenizer": ("spiece.model",)}


def loadable_class(folder: Path, kind: str) -> str:
    """`kind`, or its fast twin where only tokenizer.json is there."""
    files = _SLOW.get(kind, ())
    if all((folder / file).is_file() for file in files) or not (folder / "tokenizer.json").is_file():
        return kind
    return f"{kind}Fast"
