"""A compiled backbone as the file of another tool: the names of ModelOpt's scripts, and their axes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx

from diffc.frontend.onnx_interface import graphs_of

AXES: Mapping[str, str] = {"batch": "batch_size", "text": "sequence_length", "image": "latent_dim"}
OUTPUTS: Mapping[str, str] = {"sd3": "sample", "flux": "latent", "sdxl": "latent"}


def disguise(source: Path, output: Path, family: str) -> None:
    """Write the model of `source` under the names that ModelOpt's scripts give; channels are dynamic there."""
    model = onnx.load(source)
    graph, old = model.graph, model.graph.output[0].name
    new = OUTPUTS[family]
    for part in graphs_of(graph):
        for node in part.node:
            for names in (node.input, node.output):
                names[:] = [new if name == old else name for name in names]
    graph.output[0].name = new
    for value in (*graph.input, *graph.output):
        dims = value.type.tensor_type.shape.dim
        for dim in dims:
            if dim.dim_param:
                dim.dim_param = AXES.get(dim.dim_param, dim.dim_param)
        if value.name == "timestep" and dims:
            dims[0].dim_param = "steps"
        if len(dims) == 4:
            dims[1].dim_param = "num_channels"
    del graph.value_info[:]
    for entry in model.metadata_props:
        del entry
    onnx.save(model, output)
