"""What a reader of checkpoints gives: a backbone's config, its family, and its weights as recipes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from onnx import TensorProto

from diffc.models.family import Family
from diffc.models.sources.fingerprint import CONTENT, hash_values, hash_weights
from diffc.models.spec import Config
from diffc.models.stored.held import Held
from passes.weights.lora.fuse import Applied
from passes.weights.recipe import Recipe

_DTYPES = {int(TensorProto.FLOAT16): "float16", int(TensorProto.BFLOAT16): "bfloat16"}


@dataclass(frozen=True)
class ModelSource:
    """A backbone, checked: its config.json, its family and a recipe for every tensor, by the model's own names.

    `path` is the folder or file that holds the backbone. `pipeline_dir` is the folder of its pipeline, None for a
    backbone alone. No weight is in memory: a recipe says where the bytes lie and what is computed from them. `variant`
    is the word in the names of the files taken ("fp16"), None for plain names; a component of the pipeline that has no
    files of the variant has plain ones. `revision` is the commit of a model that lies in the cache of the Hugging Face
    hub, whose `name` is its id there; None for every other model. A model in memory has `origin`, which says what it is
    (`diffc.models.sources.live`), and `pipeline` where a whole pipeline was given; its `path` is no file.

    `stored_dtype` is the compute type where the types of the weights do not tell it, empty elsewhere. `held` are the
    layers that the files hold quantized, by their names: codes, scales and inputs; their `weights` are what the codes
    stand for. `parts`: what the file of the backbone holds besides, such as "VAE"; `beside` has their tensors, by
    their names in the file. `exact` names the weights that are not rounded to the compute type (`as_held`). `loras` are
    in the weights (`diffc.models.sources.loras`); `base` is then the model without them.
    """

    name: str
    path: Path
    pipeline_dir: Path | None
    config: Config
    family: Family
    weights: Mapping[str, Recipe]
    variant: str | None = None
    revision: str | None = None
    stored_dtype: str = ""
    held: Mapping[str, Held] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    exact: frozenset[str] = frozenset()
    beside: Mapping[str, Recipe] = field(default_factory=dict)
    pipeline: Any = field(default=None, repr=False, compare=False)
    origin: Mapping[str, Any] | None = None
    loras: tuple[Applied, ...] = ()
    base: ModelSource | None = None

    @cached_property
    def fingerprint(self) -> str:
        """`hash_weights` of the weights, of a model in memory `hash_values`; computed once."""
        return hash_weights(self.weights) if self.origin is None else hash_values(self.weights)

    def fingerprint_like(self, recorded: str) -> str:
        """The fingerprint of the kind that `recorded` is; empty where this model has none of that kind."""
        if recorded.startswith(CONTENT):
            return self.fingerprint if self.origin is not None else hash_values(self.weights)
        return self.fingerprint if self.origin is None else ""

    @property
    def has_pipeline(self) -> bool:
        """Whether the backbone has its pipeline around it, in a folder or in memory."""
        return self.pipeline_dir is not None or self.pipeline is not None

    def as_held(self) -> ModelSource:
        """The source whose quantized layers have the values of their codes, which a compile stores as they are."""
        own = {f"{name}.weight": layer.weight for name, layer in self.held.items()}
        return replace(self, weights={**self.weights, **own}, exact=frozenset(own))

    @property
    def dtype(self) -> str:
        """The compute type of the weights, that of most tensors: "float32", "float16" or "bfloat16"."""
        if self.stored_dtype:
            return self.stored_dtype
        if self.base is not None:
            return self.base.dtype
        types = Counter(recipe.dtype for recipe in self.weights.values())
        return _DTYPES.get(types.most_common(1)[0][0], "float32")

    @property
    def parameters(self) -> int:
        """How many values all tensors have together."""
        return sum(prod(recipe.shape) for recipe in self.weights.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, as stored."""
        if self.base is not None:
            return self.base.nbytes
        return sum(_stored_bytes(recipe) for recipe in self.weights.values())


def _stored_bytes(recipe: Recipe) -> int:
    """Bytes that a tensor has in its file: of codes and scales where it is dequantized."""
    if any(op.name in ("dequantize", "gguf_values") for op in recipe.ops):
        return sum(source.length for source in recipe.sources)
    return recipe.nbytes


@dataclass(frozen=True)
class HubOptions:
    """Which files of a model to read, and how a model of the Hugging Face hub is found.

    `revision`: branch, tag or commit, None for the main branch. `variant`: the word in the names of weight files, such
    as "fp16"; None takes plain names where every component has them. `subfolder`: the pipeline's or backbone's folder
    in the model. `token`: for gated and private models, None for the one that `hf auth login` stored; it is written
    nowhere. `cache_dir`: None for the hub's own cache.
    """

    revision: str | None = None
    variant: str | None = None
    subfolder: str = ""
    token: str | None = field(default=None, repr=False)
    cache_dir: Path | None = None

    def over(self, recorded: HubOptions) -> HubOptions:
        """`recorded`, with what these options say in its place."""
        said = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}
        return replace(recorded, **said)

    def to_json(self) -> dict[str, str | None]:
        """The options for a manifest, without the token."""
        cache = None if self.cache_dir is None else str(self.cache_dir)
        return {
            "revision": self.revision,
            "variant": self.variant,
            "subfolder": self.subfolder,
            "cache_dir": cache,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, str | None]) -> HubOptions:
        """The options that `to_json` wrote; those that are not there have their defaults."""
        cache = values.get("cache_dir")
        return cls(
            values.get("revision"),
            values.get("variant"),
            values.get("subfolder") or "",
            cache_dir=Path(cache) if cache else None,
        )


DEFAULT_HUB = HubOptions()
"""The options of a model that nothing is said about."""


@dataclass(frozen=True)
class Reader:
    """One way to read MODEL. `expects` says what it reads, for the error that lists all readers.

    `declines` gives the reason why this reader does not read a MODEL, None when it does; it looks at names only.
    `open` reads a MODEL that was not declined. It raises DiffcError when that is damaged or not complete, and
    UnsupportedError for a backbone that diffc does not know.
    """

    name: str
    expects: str
    declines: Callable[[str], str | None]
    open: Callable[[str], ModelSource]
