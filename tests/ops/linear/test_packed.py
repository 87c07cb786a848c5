import itertools
from typing import Any

import pytest
import torch

from kimi_linear.base.errors import BackendError, ConfigError, DtypeError, ShapeError
from kimi_linear.base.numerics import relative_error
from kimi_linear.ops.linear import PackedLinear
from kimi_linear.ops.linear.packed import FORMATS, panel_width
from support import ops

pytestmark = ops.NATIVE

EACH = pytest.mark.parametrize("format", FORMATS)
# Relative error of a normal weight after packing, and of a product with it beyond that.
WEIGHT_ERROR = {"float32": 0.0, "bfloat16": 2.5e-3, "int8": 8e-3, "int4": 0.11}
PRODUCT_ERROR = {"float32": 1e-6, "bfloat16": 3e-3, "int8": 1e-2, "int4": 1e-2}
BYTES = {"float32": 4, "bfloat16": 2, "int8": 34 / 32, "int4": 18 / 32}


def draw(N: int, K: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_weight_survives_packing(format: Any, dtype: torch.dtype) -> None:
    for N, K in [(1, 1), (7, 5), (33, 31), (64, 200), (100, 65)]:
        weight = draw(N, K).to(dtype)
        packed = PackedLinear(weight, format=format).weight()
        assert packed.shape == weight.shape
        assert relative_error(packed, weight) <= WEIGHT_ERROR[format]


@EACH
def test_no_integer_is_further_than_half_a_step_from_its_weight(format: Any) -> None:
    if not format.startswith("int"):
        return
    weight = draw(64, 256)
    groups = weight.view(64, 8, 32)
    largest = groups.abs().amax(-1, keepdim=True)
    # The step of int4 leaves the opposite end a little further off: -8 steps are there, +8 are not.
    step = largest / (127 if format == "int8" else 6)
    miss = (PackedLinear(weight, format=format).weight().view_as(groups) - groups).abs()
    assert bool((miss <= step * (0.51 if format == "int8" else 1.5)).all())
    assert float((miss <= step / 2).float().mean()) > 0.99


@EACH
def test_values_on_the_grid_are_exact(format: Any) -> None:
    least, most = {"int8": (-127, 127), "int4": (-8, 7)}.get(format, (-100, 100))
    weight = torch.randint(least, most + 1, (40, 96), generator=torch.Generator().manual_seed(0)).float() / 4
    weight[:, ::32] = least / 4
    assert torch.equal(PackedLinear(weight, format=format).weight(), weight)


@EACH
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 8, 12, 13, 49, 193])
def test_products_match_float64(format: Any, rows: int) -> None:
    for (N, K), has_bias in itertools.product([(1, 1), (7, 5), (33, 31), (64, 192), (257, 1030)], [False, True]):
        bias = draw(1, N, 2)[0] if has_bias else None
        layer = PackedLinear(draw(N, K), bias, format=format)
        x = draw(rows, K, 1)
        y = layer(x)
        product = x.double() @ layer.weight().double().t()
        assert y.shape == (rows, N)
        assert relative_error(y - (0 if bias is None else bias), product) <= PRODUCT_ERROR[format]


@EACH
def test_a_row_does_not_depend_on_the_batch_nor_on_threads(format: Any) -> None:
    layer, x = PackedLinear(draw(71, 1030), format=format), draw(401, 1030, 1)
    y = layer(x)
    for first, last in [(0, 1), (5, 7), (398, 401), (90, 97), (13, 206)]:
        assert torch.equal(layer(x[first:last]), y[first:last])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(layer(x), y)
        assert torch.equal(layer(x[:1]), y[:1])
        assert torch.equal(PackedLinear(draw(71, 1030), format=format).data, layer.data)
    finally:
        torch.set_num_threads(before)


@EACH
def test_extremes(format: Any) -> None:
    weight = draw(40, 70)
    weight[3], weight[5, 4] = 0, 1e30
    layer, x = PackedLinear(weight, format=format), draw(6, 70, 1)
    x[1], x[2], x[3, 9], x[4, 11] = 0, 1e-30, torch.inf, torch.nan
    y = layer(x)
    assert bool((y[0, 3] == 0) & (y[1] == 0).all())
    assert y[[0, 1, 2, 5]].isfinite().all()
    assert not y[4].isfinite().any()
    assert not y[3, layer.weight()[:, 9] != 0].isfinite().any()


@EACH
def test_sizes_batches_and_dtypes(format: Any) -> None:
    layer = PackedLinear(draw(64, 256), format=format)
    assert layer.nbytes == 64 * 256 * BYTES[format]
    x = draw(6, 256, 1)
    assert torch.equal(layer(x.view(2, 3, 256)).view(6, 64), layer(x))
    assert torch.equal(layer(x.t().contiguous().t()), layer(x))
    half = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, layer(x.bfloat16().float()).bfloat16())


@EACH
@pytest.mark.parametrize(("N", "K"), [(0, 70), (7, 0), (0, 0)])
def test_an_empty_weight_gives_zeros(format: Any, N: int, K: int) -> None:
    assert torch.equal(PackedLinear(draw(N, K), format=format)(draw(3, K)), torch.zeros(3, N))


@EACH
def test_some_outputs_are_those_columns_of_the_whole(format: Any) -> None:
    width = panel_width()
    layer = PackedLinear(draw(2 * width + 5, 70), draw(1, 2 * width + 5, 2)[0], format=format)
    x = draw(3, 70, 1)
    for begin, count in [(0, width), (0, 3), (width, width + 1), (2 * width, 5), (width, 0)]:
        part = layer.outputs(begin, count)
        assert part.out_features == count
        assert torch.equal(part(x), layer(x)[:, begin : begin + count])
        assert torch.equal(part.weight(), layer.weight()[begin : begin + count])
        assert part.nbytes == PackedLinear(draw(count, 70), format=format).nbytes
    for begin, count in [(1, 2), (2 * width, 6), (0, -1), (-width, width)]:
        with pytest.raises(ShapeError, match=f"outputs {begin} to {begin + count} of {2 * width + 5}"):
            layer.outputs(begin, count)


def test_wrong_arguments_are_named() -> None:
    weight = torch.ones(4, 8)
    with pytest.raises(ConfigError, match="format is 'int3', expected one of float32"):
        PackedLinear(weight, format="int3")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"weight is \[4\]"):
        PackedLinear(torch.ones(4))
    with pytest.raises(ShapeError, match=r"bias is \[8\], expected \[4\]"):
        PackedLinear(weight, torch.ones(8))
    with pytest.raises(DtypeError, match=r"weight is torch\.int64"):
        PackedLinear(torch.ones(4, 8, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"x is \[2, 7\], expected \[..., 8\]"):
        PackedLinear(weight)(torch.ones(2, 7))
    with pytest.raises(BackendError, match=r"x is torch\.float64"):
        PackedLinear(weight)(torch.ones(2, 8, dtype=torch.float64))
