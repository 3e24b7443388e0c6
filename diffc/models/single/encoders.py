"""Text encoders and VAE in the file of a backbone, put into a pipeline in the place of the pipeline's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from diffc.errors import DiffcError
from diffc.models.single.stand_ins import recipe_of, stand_in
from diffc.models.stored.decode import Statement, decode
from diffc.tensors import tensor_of
from passes.weights.recipe import Recipe

Weights = Mapping[str, Recipe]
_PLAIN = (
    "cond_stage_model.transformer.",
    "conditioner.embedders.0.transformer.",
    "text_encoders.clip_l.transformer.",
    "text_encoders.clip_g.transformer.",
    "text_encoders.t5xxl.transformer.",
    "text_encoders.qwen25_7b.transformer.",
)
_OPEN_CLIP = ("conditioner.embedders.1.model.", "conditioner.embedders.0.model.", "cond_stage_model.model.")
_VAE = ("first_stage_model.", "vae.")
_UNSTORED = ("position_ids", "embed_tokens.weight", "logit_scale", "spiece_model")
"""Ends of names that a file may lack, or have beside: made by the model itself, or the same as another tensor."""


def put_into(pipe: Any, beside: Weights, where: object) -> list[str]:
    """Give the components of `pipe` the weights of the file's text encoders and VAE; the names of those that got some.

    `beside`: the file's tensors beside the backbone. A component is recognised by names and shapes. Raises DiffcError
    for a part of the file that fits no component.
    """
    taken = list[str]()
    modules = {name: part for name, part in pipe.components.items() if hasattr(part, "state_dict")}
    for prefix, weights in _parts(beside, where):
        name = next((n for n, m in modules.items() if n not in taken and _fits(m, weights(m))), None)
        if name is None:
            raise DiffcError(
                f"{where} holds {prefix.rstrip('.')}, which fits no component of the pipeline",
                fix="give the pipeline of the same base with --pipeline",
            )
        module = modules[name]
        own, values = module.state_dict(), weights(module)
        state = {key: tensor_of(recipe, own[key].dtype) for key, recipe in values.items() if key in own}
        module.load_state_dict(state, strict=False)
        taken.append(name)
    return taken


def _parts(beside: Weights, where: object) -> Iterator[tuple[str, Callable[[Any], Weights]]]:
    """Each part by its prefix, and what gives its weights by the names of a component."""
    makers = [(prefix, _plain) for prefix in _PLAIN]
    makers += [(prefix, _open_clip) for prefix in _OPEN_CLIP]
    makers += [(prefix, _vae) for prefix in _VAE]
    for prefix, make in makers:
        own = {key: recipe for key, recipe in beside.items() if key.startswith(prefix)}
        if own:
            plain = decode(own, Statement(comfyui=True), where).weights
            yield prefix, lambda module, p=prefix, w=plain, m=make: m(module, w, p)  # type: ignore[misc]


def _fits(module: Any, weights: Weights) -> bool:
    """Whether a module has all weights, in these shapes, and no others."""
    own = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    same = all(key in own and own[key] == recipe.shape for key, recipe in _stored(weights).items())
    return bool(weights) and same and not [key for key in _stored(own) if key not in weights]


def _stored(names: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in names.items() if not key.endswith(_UNSTORED)}


def _plain(module: Any, weights: Weights, prefix: str) -> Weights:
    """Names of transformers after the prefix; newer ones leave `text_model.` out, older files have it."""
    names = {key.removeprefix(prefix): recipe for key, recipe in weights.items()}
    if any(key.startswith("text_model.") for key in module.state_dict()):
        return names
    return {key.removeprefix("text_model."): recipe for key, recipe in names.items()}


def _open_clip(module: Any, weights: Weights, prefix: str) -> Weights:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    if not hasattr(module.config, "hidden_size"):
        return {}
    state = {key: stand_in(recipe, key) for key, recipe in weights.items()}
    made = convert_open_clip_checkpoint(module, state, prefix=prefix)
    names = {key: recipe_of(value)[0] for key, value in made.items()}
    return _plain(module, names, "")


def _vae(module: Any, weights: Weights, prefix: str) -> Weights:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    del prefix
    if not hasattr(module, "decoder"):
        return {}
    state = {key: stand_in(recipe, key) for key, recipe in weights.items()}
    made = convert_ldm_vae_checkpoint(state, module.config)
    return {key: recipe_of(value)[0] for key, value in made.items()}
