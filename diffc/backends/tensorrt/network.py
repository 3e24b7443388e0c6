"""A TensorRT network as JSON: what was parsed, layer by layer, for people and for comparing two compiles."""

from __future__ import annotations

from typing import Any


def describe(network: Any) -> dict[str, Any]:
    """Inputs, outputs and layers of an INetworkDefinition, with names, types, precisions and shapes.

    A dimension of -1 is dynamic.
    """
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    return {
        "name": network.name,
        "inputs": [_tensor(network.get_input(i)) for i in range(network.num_inputs)],
        "outputs": [_tensor(network.get_output(i)) for i in range(network.num_outputs)],
        "layers": [_layer(layer) for layer in layers],
    }


def _layer(layer: Any) -> dict[str, Any]:
    inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
    return {
        "name": layer.name,
        "type": layer.type.name,
        "inputs": [_tensor(t) for t in inputs if t is not None],
        "outputs": [_tensor(layer.get_output(i)) for i in range(layer.num_outputs)],
    }


def _tensor(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "precision": tensor.dtype.name, "shape": _shape(tensor)}


def _shape(tensor: Any) -> list[int] | None:
    """The dims, or None for a rank that is known only at run time (its length raises ValueError)."""
    try:
        return [int(d) for d in tensor.shape]
    except ValueError:
        return None
