"""What calibration and training found, kept in a folder without pickle: the settings and amax of every quantizer.

The weights stay in the model's own files, but for those that training has changed: these a checkpoint carries. The
same checkpoint goes onto a backbone with real weights (to simulate the format in torch) and onto one under
FakeTensorMode (to export it).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffc.errors import DiffcError
from diffc.quantize import folder, modelopt_file
from diffc.quantize.attention import attention_layers
from diffc.quantize.convert import (
    convert_layers,
    enabled_quantizers,
    layer_of,
    role_of,
    weighted_layers,
)
from diffc.quantize.fingerprint import backbone_config, config_hash
from diffc.quantize.formats import STORED
from diffc.quantize.kinds import Settings, kind_of
from diffc.quantize.scaling import apply_scaling
from diffc.quantize.sound import check_settings, check_shapes, check_values
from diffc.quantize.state import (
    SCALING,
    Amax,
    Scaling,
    attributes_of,
    settings_of,
    tensor_of,
    usable_amax,
)
from diffc.quantize.trained import check_weights, put_weights
from passes.weights.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn

LIBRARIES = ("nvidia-modelopt", "torch", "diffusers")


@dataclass(frozen=True)
class Checkpoint:
    """The quantizers of one calibrated backbone.

    `config` is that of the backbone (`fingerprint.backbone_config`). `settings` and `amax` are by the module
    path of the quantizer; `amax` has none for a kind without (mxfp8). `scaling` is by that path and one of
    `state.SCALING`. `source` is the fingerprint of the weights that were calibrated (`ModelSource`), empty
    when unknown. `calibration` records prompts, steps and seed.

    `weights` has the tensors that take the place of the model's own, by their names in the backbone's state_dict:
    those that training has changed. They are in the quantizer's own domain, which means that a weight with channel
    factors or a low-rank branch is stored as it is after both.
    """

    family: str
    format: str
    config: Mapping[str, Any]
    settings: Mapping[str, Settings]
    amax: Mapping[str, Amax]
    source: str = ""
    calibration: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    scaling: Scaling = field(default_factory=dict)
    weights: Mapping[str, Recipe] = field(default_factory=dict)

    @classmethod
    def from_backbone(
        cls,
        backbone: nn.Module,
        *,
        family: str,
        format: str,
        source: str = "",
        calibration: Mapping[str, Any] | None = None,
        weights: Mapping[str, Recipe] | None = None,
    ) -> Checkpoint:
        """The checkpoint of a calibrated backbone. Raises DiffcError when a quantizer has no usable amax.

        The weights of `backbone` are taken to be the model's own, changed by nothing but the format's scaling;
        `weights` are those that are not (`diffc.quantize.trained.trained_weights`).
        """
        quantizers = enabled_quantizers(backbone)
        settings = {name: settings_of(q.get_modelopt_state()) for name, q in quantizers.items()}
        kinds = {name: kind_of(value) for name, value in settings.items()}
        amax = {
            name: usable_amax(name, getattr(q, "_amax", None), kinds[name])
            for name, q in quantizers.items()
            if kinds[name].has_amax
        }
        return cls(
            family,
            format,
            backbone_config(backbone),
            settings,
            {name: value.detach().cpu().numpy() for name, value in amax.items()},
            source,
            json.loads(json.dumps(calibration or {})),
            {library: metadata.version(library) for library in LIBRARIES},
            _scaling(backbone),
            weights or {},
        )

    @classmethod
    def from_modelopt(
        cls, path: Path, backbone: nn.Module, *, family: str, weights: Mapping[str, Recipe] | None = None
    ) -> Checkpoint:
        """The checkpoint in a file of ModelOpt's `mto.save`, for the unquantized `backbone` (fake or real).

        `weights` are the model's own: those of the file that are equal to them are not carried, all others are.
        Quantizers that ModelOpt puts on norms by accident are left out. Raises DiffcError as
        `diffc.quantize.modelopt_file.read` does.
        """
        return cls._of_modelopt(modelopt_file.read(path, backbone, weights or {}), backbone, family)

    @classmethod
    def from_modelopt_object(
        cls,
        name: str,
        content: Mapping[str, Any],
        stored: Mapping[str, Recipe],
        backbone: nn.Module,
        *,
        family: str,
        weights: Mapping[str, Recipe],
    ) -> Checkpoint:
        """The same for a model in memory: `content` is what `mto.save` would write, `stored` its tensors as recipes."""
        found = modelopt_file.found_in(name, content, stored, backbone, weights)
        return cls._of_modelopt(found, backbone, family)

    def of_source(self, fingerprint: str) -> Checkpoint:
        """The same calibration, of the weights with this fingerprint."""
        return replace(self, source=fingerprint)

    @classmethod
    def _of_modelopt(cls, found: modelopt_file.Found, backbone: nn.Module, family: str) -> Checkpoint:
        return cls(
            family,
            found.format,
            backbone_config(backbone),
            found.settings,
            found.amax,
            versions={"nvidia-modelopt": found.version},
            scaling=found.scaling,
            weights=found.weights,
        )

    @property
    def scales_weights(self) -> bool:
        """Whether `scaling` still has to be applied to the weights: a file's own codes have it in them."""
        return self.format != STORED.name

    @property
    def digest(self) -> str:
        """SHA-256 of what the quantizers are: their settings and values, and the weights that are carried."""
        weights = {name: recipe.to_json() for name, recipe in self.weights.items()}
        text = json.dumps([self.settings, weights], sort_keys=True, default=str)
        found = hashlib.sha256(text.encode())
        for name, array in sorted(_tensors(self.amax, self.scaling).items()):
            found.update(f"{name} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return found.hexdigest()

    @property
    def config_hash(self) -> str:
        """SHA-256 of the backbone's config."""
        return config_hash(self.config)

    def save(self, directory: Path) -> None:
        """Write the folder, all of it or nothing; an earlier checkpoint of that name is replaced.

        Equal checkpoints give equal bytes. Raises DiffcError when `directory` is something else, and when it
        cannot be written.
        """
        record = {name: getattr(self, name) for name in _RECORDED} | {"config_sha256": self.config_hash}
        folder.write(directory, record, _tensors(self.amax, self.scaling), self.weights)

    @classmethod
    def load(cls, directory: Path) -> Checkpoint:
        """Read a folder that `save` wrote. Raises DiffcError when it is missing, damaged or too new."""
        record, tensors, weights = folder.read(directory, _RECORDED)
        check_settings(directory, record["settings"])
        named = {name.rpartition(".")[::2]: array for name, array in tensors.items()}
        amax = {path: named[path, "amax"] for path in record["settings"] if (path, "amax") in named}
        scaling = {f"{path}.{kind}": array for (path, kind), array in named.items() if kind in SCALING}
        expected = {path for path in record["settings"] if _keeps_amax(directory, record["settings"], path)}
        strange = tensors.keys() - scaling.keys() - {f"{path}.amax" for path in amax}
        if differing := sorted((expected ^ amax.keys()) | strange):
            raise folder.damaged(
                directory, f"{folder.RECORD} and {folder.TENSORS} disagree on {', '.join(differing[:3])}"
            )
        check_values(directory, amax, scaling)
        return cls(amax=amax, scaling=scaling, weights=weights, **record)

    def check(self, backbone: nn.Module, family: str, source: str = "") -> None:
        """Raises DiffcError that says what differs when this checkpoint belongs to another model.

        `source` is the fingerprint of the model's weights (`ModelSource`); an empty one is not compared.
        """
        fix = "give the checkpoint of this model, or calibrate it anew (leave --from-checkpoint out)"
        if family != self.family:
            raise DiffcError(f"the checkpoint is of family {self.family!r}, the model is {family!r}", fix=fix)
        theirs = backbone_config(backbone)
        differing = [
            f"{key} is {self.config.get(key)!r} in the checkpoint and {theirs.get(key)!r} in the model"
            for key in sorted(self.config.keys() | theirs.keys())
            if self.config.get(key) != theirs.get(key)
        ]
        if differing:
            raise DiffcError(f"the checkpoint is of another {family} model: {'; '.join(differing)}", fix=fix)
        if source and self.source and source != self.source:
            raise DiffcError("the checkpoint was calibrated on other weights of the same shape", fix=fix)
        check_weights(backbone, self.weights)

    def apply(self, backbone: nn.Module, family: str) -> None:
        """Insert these quantizers, calibrated, into an unquantized backbone, in place, and the weights carried here.

        Under FakeTensorMode amax are fake buffers of the right shape; else they lie on the backbone's device. Fake
        weights, and weights on the meta device, stay as they are: they have shapes only.
        Raises DiffcError when the backbone is another model or holds quantizers already.
        """
        from modelopt.torch.quantization.config import QuantizerAttributeConfig

        self.check(backbone, family)
        layers = {layer_of(name) for name in self.settings}
        there = [*weighted_layers(backbone), *attention_layers(backbone)]
        if missing := sorted(layers.difference(there)):
            raise DiffcError(
                f"the checkpoint quantizes {missing[0]}, which this {type(backbone).__name__} does not have",
                fix=f"calibrate again (it was made with {self.versions})",
            )
        shapes = {
            name: tuple(backbone.get_parameter(f"{name}.weight").shape) for name in weighted_layers(backbone)
        }
        check_shapes("the checkpoint", self.settings, self.amax, self.scaling, shapes)
        convert_layers(backbone, [name for name in there if name in layers])
        like = next(backbone.parameters())
        _make_sequences(backbone, self.settings)
        for name, settings in self.settings.items():
            quantizer: Any = backbone.get_submodule(name)
            quantizer.set_from_attribute_config(QuantizerAttributeConfig(**attributes_of(settings)))
            if name in self.amax:
                quantizer.amax = tensor_of(self.amax[name], like)
        apply_scaling(backbone, self.scaling, weights=self.scales_weights)
        put_weights(backbone, self.weights)


def _keeps_amax(directory: Path, settings: Mapping[str, Settings], path: str) -> bool:
    """Whether the quantizer at `path` has an amax; the folder is damaged when its settings do not say."""
    try:
        return kind_of(settings[path]).has_amax
    except (KeyError, TypeError, AttributeError, DiffcError) as error:
        raise folder.damaged(directory, f"the settings of {path} are not those of a quantizer") from error


def _make_sequences(backbone: nn.Module, settings: Mapping[str, Settings]) -> None:
    """Let weights that go through several quantizers (`weight_quantizer.0`, `.1`) have them."""
    from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer

    count = Counter(name.rpartition(".")[0] for name in settings if name.rpartition(".")[2].isdigit())
    for path, number in count.items():
        layer = backbone.get_submodule(layer_of(path))
        setattr(layer, role_of(path), SequentialQuantizer(*(TensorQuantizer() for _ in range(number))))


def _scaling(backbone: nn.Module) -> dict[str, Any]:
    """What the quantizers of a calibrated backbone hold beside amax, as float32 arrays."""
    found = {}
    for name, quantizer in backbone.named_modules():
        for kind in SCALING if name.endswith("_quantizer") else ():
            value = getattr(quantizer, f"_{kind}", None)
            if value is not None:
                found[f"{name}.{kind}"] = value.detach().float().cpu().numpy()
    return found


def _tensors(amax: Mapping[str, Amax], scaling: Scaling) -> dict[str, Amax]:
    return {f"{name}.amax": array for name, array in amax.items()} | dict(scaling)


_RECORDED = tuple(f.name for f in fields(Checkpoint) if f.name not in ("amax", "scaling", "weights"))
