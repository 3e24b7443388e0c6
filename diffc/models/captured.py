"""A family made from an interface that was read off a pipeline: what a family file would say, without a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffc.models.family import Family
from diffc.models.hints import hints_of
from diffc.models.interface import Input, Interface
from diffc.models.spec import Config, DimSpec, InputSpec, Sample, Shape


def captured_family(interface: Interface, config: Config) -> Family:
    """The family of one backbone: its functions take a config.json for form, and answer from `interface`."""
    hints = hints_of(interface.backbone_class)
    inputs = tuple(_input_spec(item) for item in interface.inputs)
    output = interface.outputs[0]
    dims = tuple(DimSpec(d.name, d.multiple, d.maximum) for d in interface.dimensions)
    return Family(
        name=hints.name,
        backbone_class=interface.backbone_class,
        component=interface.component,
        inputs=_always(inputs),
        output=output.name,
        output_dims=_always(output.dims),
        dims=_always(dims),
        sizes=lambda shape: sizes_of(interface, shape),
        pixel_multiple=_always(interface.multiple),
        native=_always(Shape(**interface.native)),
        unquantized=hints.kept(config),
        calibration=hints.calibration,
        output_class=interface.output_class,
        attributes=_always(interface.attributes),
        cache_plans=hints.cache_plans,
        constants=interface.constants,
        tuples=interface.tuples,
        lists=interface.lists,
        frames=interface.frames,
        interface=interface,
    )


def _always(value: Any) -> Callable[[Config], Any]:
    return lambda _: value


def _input_spec(item: Input) -> InputSpec:
    kinds: Mapping[str, Sample] = {
        "values": "normal",
        "mask": "mask",
        "positions": "seen",
        "size": "size",
        "lengths": "lengths",
    }
    sample = kinds.get(item.kind) or ("timestep" if item.high > 2 else "sigma")
    return InputSpec(item.name, item.dims, item.dtype, sample, item.path, item.low, item.high, item.bound)


def sizes_of(interface: Interface, shape: Shape) -> dict[str, int]:
    """`Family.sizes` of a captured family: every dimension by its relation to the settings."""
    setting = {
        "batch": shape.batch,
        "height": shape.height,
        "width": shape.width,
        "frames": shape.frames,
        "text": shape.text,
    }
    return {d.name: max(1, int(d.relation.at(setting))) for d in interface.dimensions}
