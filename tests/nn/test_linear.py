import pytest
import torch
from torch import nn

from kimi_linear.base.numerics import relative_error
from kimi_linear.nn import linear as module
from kimi_linear.nn.linear import Linear


@pytest.mark.parametrize("rows", [(3,), (4, 40)])
@pytest.mark.parametrize("autocast", [False, True])
def test_it_is_torchs_layer(rows: tuple[int, ...], autocast: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = Linear(24, 40), nn.Linear(24, 40)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(*rows, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y, expected = ours(x), theirs(x)
    y.float().sum().backward()
    expected.float().sum().backward()
    assert y.dtype == expected.dtype
    assert relative_error(y, expected) < (5e-3 if autocast else 1e-6)
    assert relative_error(ours.weight.grad, theirs.weight.grad) < (8e-3 if autocast else 1e-6)


def test_many_float32_rows_take_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(module, "linear", lambda *arguments: calls.append(arguments[0].shape))
    layer = Linear(8, 4)
    layer(torch.zeros(2, 16, 8))
    layer(torch.zeros(3, 8))
    layer.bfloat16()(torch.zeros(64, 8).bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer.float()(torch.zeros(64, 8))
    assert calls == [(2, 16, 8)]
