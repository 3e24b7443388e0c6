"""name-dimensions: dynamic dimensions get names that options can spell."""

import numpy as np
import onnx
import pytest

from passes.canonical.name_dimensions import NameDimensions
from tests.passes.graph_helpers import apply, check_same, model

RNG = np.random.default_rng(3)


def dims(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def unnamed(*sizes: int | str | None) -> onnx.ModelProto:
    """A model whose input has these dimensions; None: neither a size nor a name."""
    made = model("g (float[a, b, c] x) => (float[p, q, r] y) { h = Neg(x)  y = Exp(h) }")
    for dim, size in zip(made.graph.input[0].type.tensor_type.shape.dim, sizes, strict=True):
        dim.Clear()
        if isinstance(size, str):
            dim.dim_param = size
        elif size is not None:
            dim.dim_value = size
    return made


@pytest.mark.parametrize(
    ("sizes", "names"),
    [
        ((None, 3, None), ["x_0", 3, "x_2"]),
        ((0, -1, 4), ["x_0", "x_1", 4]),
        (("batch size", "h=2*w", "batch size"), ["batch_size", "h_2_w", "batch_size"]),
        (("x_1", None, "x 1"), ["x_1", "x_1_2", "x_1_3"]),
        (("größe", ",", "a.b-c"), ["größe", "size", "a.b-c"]),
    ],
)
def test_names_and_what_follows_from_them(
    sizes: tuple[int | str | None, ...], names: list[int | str]
) -> None:
    made = unnamed(*sizes)
    result = apply(made, NameDimensions()).model
    assert dims(result.graph.input[0]) == names
    (inner,) = [value for value in result.graph.value_info if value.name == "h"]
    assert dims(inner) == names
    if 0 not in sizes:
        x = RNG.standard_normal([size if isinstance(size, int) and size > 0 else 2 for size in sizes])
        check_same(made, result, {"x": x.astype(np.float32)})


def test_named_dimensions_stay() -> None:
    assert apply(unnamed("batch", 3, "h.w-1"), NameDimensions()).changed == 0
