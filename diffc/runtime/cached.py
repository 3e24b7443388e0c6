"""One session over the models of a cached artifact: it knows which of them runs which denoising step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor

from diffc.artifact.folder import Artifact
from diffc.backends.session import Session
from diffc.backends.signature import Signature
from diffc.cache.chain import run_chain
from diffc.cache.generations import Generations, time_and_conditions
from diffc.cache.layout import KeptTensor
from diffc.cache.resolve import ResolvedCache
from diffc.models.family import Family
from diffc.models.sizes import size_of
from diffc.runtime.profile import profile_of

KEPT = "cached_"


@dataclass(frozen=True)
class Stepper:
    """One of the artifact's models, opened.

    It uses the kept values of the groups `reuse`, or is a segment that steps which use `group` again leave out.
    """

    reuse: frozenset[int]
    session: Session
    signature: Signature
    group: int | None = None

    @property
    def gives(self) -> list[str]:
        """The names of its outputs."""
        return [value.name for value in self.signature.outputs]

    def run(self, values: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """All outputs, with those to keep; `values` may hold more than the model takes."""
        inputs = {value.name: values[value.name] for value in self.signature.inputs}
        shapes = {v.name: tuple(size_of(d, sizes) for d in v.dims) for v in self.signature.outputs}
        return self.session.run(inputs, shapes)


class CachedSession:
    """A `Session` that tells denoising steps apart and runs each with the model that the plan has for it.

    Kept tensors stay on the device, as the models returned them, one set for each thread and branch of guidance.
    A step that cannot follow the one before (see `Generations`) runs everything.
    """

    def __init__(self, plan: ResolvedCache, steppers: Sequence[Stepper], signature: Signature):
        """`signature` is the backbone's."""
        self.plan, self.generations = plan, Generations()
        self._steppers = sorted(steppers, key=lambda s: -len(s.reuse))  # the last runs all
        self._signature = signature

    @property
    def device(self) -> torch.device:
        """Where inputs and outputs live."""
        return self._steppers[-1].session.device

    def run(
        self, inputs: Mapping[str, Tensor], output_shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Tensor]:
        """The outputs of the denoising step that this call is. Raises DiffcError as the models' sessions do."""
        generation = self.generations.advance(*time_and_conditions(inputs))
        wanted = self.plan.reused(generation.step, self.generations.count)
        self.generations.note(reused=bool(wanted))
        found = self._step(wanted, inputs, generation.values, _sizes(self._signature, inputs))
        return {name: found[name] for name in output_shapes}

    def _step(
        self,
        wanted: frozenset[int],
        inputs: Mapping[str, Tensor],
        held: dict[str, Tensor],
        sizes: Mapping[str, int],
    ) -> dict[str, Tensor]:
        """The outputs of a step that may use the groups `wanted` again; `held` has kept values, and gets new ones."""
        stepper = next(s for s in self._steppers if s.reuse <= wanted)
        found = stepper.run({**inputs, **held}, sizes)
        held |= {name: value for name, value in found.items() if name.startswith(KEPT)}
        return found

    @contextmanager
    def branch(self, name: str) -> Iterator[None]:
        """Steps of this thread belong to the branch of guidance `name` while this is open."""
        with self.generations.branch(name):
            yield

    def close(self) -> None:
        """Forget what is kept, and free the models."""
        self.generations.forget()
        for stepper in self._steppers:
            stepper.session.close()


class ChainSession(CachedSession):
    """A CachedSession for the layout `segments`: a step runs one segment after another, without those it uses again."""

    def __init__(
        self,
        plan: ResolvedCache,
        steppers: Sequence[Stepper],
        signature: Signature,
        kept: Sequence[KeptTensor],
    ):
        super().__init__(plan, steppers, signature)
        self._kept = kept

    def _step(
        self,
        wanted: frozenset[int],
        inputs: Mapping[str, Tensor],
        held: dict[str, Tensor],
        sizes: Mapping[str, int],
    ) -> dict[str, Tensor]:
        return run_chain(
            self._steppers, self._kept, wanted, inputs, held, lambda part, flow: part.run(flow, sizes)
        )


def _sizes(signature: Signature, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    return {
        dim: size
        for value in signature.inputs
        for dim, size in zip(value.dims, inputs[value.name].shape, strict=True)
        if isinstance(dim, str)
    }


def open_cached(
    artifact: Artifact,
    spec: Family,
    signature: Signature,
    open_one: Callable[[Artifact, Signature], Session],
    *,
    follow: bool = True,
) -> CachedSession:
    """The session of an artifact that was compiled with a cache plan; `open_one` opens one of its models.

    `signature` is the backbone's; where it has profiles, each model gets one for its own inputs. Without `follow` every
    step runs the whole backbone: the model that runs all blocks is opened alone, or all segments are.
    """
    entry = artifact.manifest["cache"]
    chain = entry.get("layout") == "segments"
    steppers = []
    for model in entry["models"] if follow or chain else entry["models"][:1]:
        own = Signature.of(model, signature.limits)
        if signature.profiles:
            own = replace(own, profiles=(profile_of(artifact.manifest, spec, own),))
        session = open_one(single_model(artifact, model), own)
        steppers.append(Stepper(frozenset(model.get("reuse", ())), session, own, model.get("group")))
    plan = ResolvedCache.from_json(entry["plan"])
    plan = plan if follow else replace(plan, groups=())
    if not chain:
        return CachedSession(plan, steppers, signature)
    return ChainSession(plan, steppers, signature, [KeptTensor(**item) for item in entry["kept"]])


def single_model(artifact: Artifact, model: Mapping[str, Any]) -> Artifact:
    """The artifact with one model: `model`, an entry of the manifest's list of cached models."""
    engines = [
        e for e in artifact.manifest["engines"] if PurePosixPath(e["file"]).stem.endswith(model["suffix"])
    ]
    own = {
        "targets": model["files"],
        "engines": engines,
        "inputs": model["inputs"],
        "outputs": model["outputs"],
    }
    return Artifact(artifact.folder, {**artifact.manifest, **own})
