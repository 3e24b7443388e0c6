"""Tokenizers for transformers 4, which optimum-onnx needs, from the files that transformers 4 or 5 wrote."""

from __future__ import annotations

import json
from pathlib import Path

from diffc.models.sources.json_files import read_json

# What the slow class of transformers 4 reads. transformers 5 has one class under that name and writes tokenizer.json.
_SLOW = {"CLIPTokenizer": ("vocab.json", "merges.txt"), "T5Tokenizer": ("spiece.model",)}


def loadable_class(folder: Path, kind: str) -> str:
    """The class of transformers 4 that reads `folder`: `kind`, or its fast class when only tokenizer.json exists."""
    files = _SLOW.get(kind, ())
    if all((folder / file).is_file() for file in files) or not (folder / "tokenizer.json").is_file():
        return kind
    return f"{kind}Fast"


def rewrite_config(folder: Path) -> None:
    """Let tokenizer_config.json list special tokens as transformers 4 does; a file without such a list stays.

    transformers 5 writes them as a list under extra_special_tokens, where transformers 4 wants a dictionary; its name
    for the list is additional_special_tokens.
    """
    path = folder / "tokenizer_config.json"
    config = read_json(path)
    tokens = config.get("extra_special_tokens")
    if not isinstance(tokens, list):
        return
    del config["extra_special_tokens"]
    if tokens:
        config.setdefault("additional_special_tokens", tokens)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
