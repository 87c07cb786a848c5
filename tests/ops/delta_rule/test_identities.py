"""What the recurrence implies, whatever computes it: symmetries, linearity, limits and invariants."""

import pytest
import torch
from torch import Tensor

from kimi_linear.base.numerics import relative_error, tolerance
from kimi_linear.ops import kda
from kimi_linear.ops.delta_rule.specs import DeltaRuleCase
from support import ops
from support.delta_rule import Inputs, assert_close, call, draw, errors, run, widest

BACKENDS = ops.backends("delta_rule")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
CASE = DeltaRuleCase(name="x", T=70, B=2, H=2, HV=4, K=8, V=6)
READS = pytest.mark.parametrize("read", ["post", "pre"])


def delta(inputs: Inputs, backend: str) -> tuple[Tensor, Tensor]:
    return call("delta_rule", inputs, backend)


def draw_for(backend: str, case: DeltaRuleCase, seed: int = 0) -> Inputs:
    """Return a case's arguments in the most precise dtype of a backend."""
    return draw(case, widest("delta_rule", backend), seed)


@every_backend
@READS
def test_permuting_key_channels_commutes(backend, read) -> None:
    inputs = {**draw_for(backend, CASE), "read": read}
    order = torch.randperm(8)
    o, state = delta(inputs, backend)
    moved = {name: inputs[name][..., order] for name in ("q", "k", "erase_key", "log_decay")}
    found = delta({**inputs, **moved, "initial_state": inputs["initial_state"][:, :, order]}, backend)
    assert_close(found, (o, state[:, :, order]))


@every_backend
def test_permuting_value_channels_commutes(backend) -> None:
    inputs = draw_for(backend, CASE)
    order = torch.randperm(6)
    o, state = delta(inputs, backend)
    moved = {name: inputs[name][..., order] for name in ("write_value", "initial_state")}
    assert_close(delta({**inputs, **moved}, backend), (o[..., order], state[..., order]))


@every_backend
def test_permuting_heads_commutes(backend) -> None:
    """Key heads with the value heads of their groups, and value heads inside a group."""
    inputs = draw_for(backend, CASE)
    groups, heads = torch.tensor([1, 0]), torch.tensor([3, 2, 0, 1])
    o, state = delta(inputs, backend)
    moved = {name: inputs[name][:, :, groups] for name in ("q", "k")}
    moved |= {name: inputs[name][:, :, heads] for name in ("erase_key", "write_value", "log_decay")}
    found = delta({**inputs, **moved, "initial_state": inputs["initial_state"][:, heads]}, backend)
    assert_close(found, (o[:, :, heads], state[:, heads]))


@every_backend
def test_grouped_heads_equal_repeated_ones(backend) -> None:
    inputs = draw_for(backend, CASE)
    repeated = {name: inputs[name].repeat_interleave(2, 2) for name in ("q", "k")}
    assert_close(delta({**inputs, **repeated}, backend), delta(inputs, backend))


@every_backend
def test_outputs_are_linear_in_values_and_initial_state(backend) -> None:
    one, other = draw_for(backend, CASE), draw_for(backend, CASE, seed=1)
    sums = {name: 2 * one[name] - 3 * other[name] for name in ("write_value", "initial_state")}
    second = delta({**one, "write_value": other["write_value"], "initial_state": other["initial_state"]}, backend)
    expected = [2 * x - 3 * y for x, y in zip(delta(one, backend), second, strict=True)]
    assert_close(delta({**one, **sums}, backend), (expected[0], expected[1]))


@every_backend
def test_scale_multiplies_the_output_alone(backend) -> None:
    inputs = draw_for(backend, CASE)
    o, state = delta({**inputs, "scale": 1.0}, backend)
    assert_close(delta({**inputs, "scale": -2.5}, backend), (-2.5 * o, state))
    assert_close(delta({**inputs, "scale": None}, backend), (8**-0.5 * o, state))


@every_backend
def test_without_writes_the_state_only_decays(backend) -> None:
    """Strength zero: o = scale q exp(G) S_0."""
    inputs = draw_for(backend, DeltaRuleCase(name="x", T=40, beta=0.0, gate="slow"))
    decay = inputs["log_decay"].cumsum(1).exp()
    o = 8**-0.5 * torch.einsum("bthk,bthk,bhkv->bthv", inputs["q"], decay, inputs["initial_state"])
    assert_close(delta(inputs, backend), (o, decay[:, -1].unsqueeze(-1) * inputs["initial_state"]))


@every_backend
@READS
def test_where_everything_is_forgotten_a_token_reads_itself_alone(backend, read) -> None:
    """o_t = scale (q_t k_t) z_t, the state is the last write; read before the decay the old state is erased once."""
    inputs = {**draw_for(backend, DeltaRuleCase(name="x", T=40, gate="closed", erase="none")), "read": read}
    q, k, z = inputs["q"], inputs["k"], inputs["write_value"]
    o = 8**-0.5 * (q * k).sum(-1, keepdim=True) * z
    last = k[:, -1].unsqueeze(-1) * z[:, -1].unsqueeze(-2)
    assert_close(delta(inputs, backend), (o, last))
    if read == "post":
        assert_close(delta({**inputs, "erase_key": k}, backend), (o, last))


@every_backend
@pytest.mark.parametrize("scalar", [False, True])
def test_a_decay_of_minus_infinity_forgets_as_one_of_minus_a_thousand(backend, scalar) -> None:
    inputs = draw(DeltaRuleCase(name="x", T=70, gate="separators", scalar_decay=scalar))
    forgotten = inputs["log_decay"] == -1000
    assert forgotten.any()
    infinite = {**inputs, "log_decay": inputs["log_decay"].masked_fill(forgotten, -torch.inf)}
    expected = run("delta_rule", inputs, backend)
    for name, x in run("delta_rule", infinite, backend).items():
        assert torch.equal(x, expected[name]), name


@every_backend
def test_a_unit_key_at_full_strength_reads_its_value_back(backend) -> None:
    inputs = draw_for(backend, DeltaRuleCase(name="x", T=40, beta=1.0, gate="medium", keys="correlated"))
    o, _ = delta({**inputs, "q": inputs["k"], "scale": 1.0}, backend)
    ops.assert_close(o, inputs["write_value"])


@every_backend
def test_orthonormal_keys_make_the_delta_rule_linear_attention(backend) -> None:
    dtype = widest("delta_rule", backend)
    keys = torch.linalg.qr(torch.randn(8, 8, dtype=dtype)).Q.view(1, 8, 1, 8)
    v, q = torch.randn(1, 8, 1, 3, dtype=dtype), torch.randn(1, 8, 1, 8, dtype=dtype)
    ones, zeros = torch.ones(1, 8, 1, dtype=dtype), torch.zeros(1, 8, 1, 8, dtype=dtype)
    o, state = kda(q, keys, v, zeros, ones, scale=1.0, backend=backend)
    scores = torch.einsum("bthk,bshk->bhts", q, keys).tril()
    assert_close((o, state), (torch.einsum("bhts,bshv->bthv", scores, v), torch.einsum("bthk,bthv->bhkv", keys, v)))


@every_backend
@pytest.mark.parametrize("scalar", [False, True])
def test_read_before_the_decay_is_reading_after_it_with_a_key_divided_by_it(backend, scalar) -> None:
    inputs = draw_for(backend, DeltaRuleCase(name="x", T=70, read="pre", scalar_decay=scalar))
    alpha = inputs["log_decay"].exp()
    divided = inputs["erase_key"] / (alpha.unsqueeze(-1) if scalar else alpha)
    assert_close(delta(inputs, backend), delta({**inputs, "read": "post", "erase_key": divided}, backend))


@every_backend
def test_one_decay_a_head_is_equal_decays_of_all_channels(backend) -> None:
    inputs = draw_for(backend, DeltaRuleCase(name="x", T=70, scalar_decay=True))
    spread = {**inputs, "log_decay": inputs["log_decay"].unsqueeze(-1).expand(-1, -1, -1, 8)}
    scalar, channel = run("delta_rule", inputs, backend), run("delta_rule", spread, backend)
    channel["d_log_decay"] = channel["d_log_decay"].sum(-1)
    assert errors(scalar, channel, inputs["q"].dtype) == {}


@every_backend
@READS
@pytest.mark.parametrize("scalar", [False, True])
def test_the_first_decays_gradient_is_that_of_the_state_it_meets(backend, read, scalar) -> None:
    """dg_1 = sum_v S_0 dS_0, but for what an erase key read before the decay takes from S_0 past it."""
    erase = "none" if read == "pre" else "value"
    inputs = draw_for(backend, DeltaRuleCase(name="x", T=70, erase=erase, scalar_decay=scalar, read=read))
    found = run("delta_rule", inputs, backend)
    expected = (inputs["initial_state"] * found["d_initial_state"]).sum(-1)
    expected = expected.sum(-1) if scalar else expected
    limit = tolerance(inputs["q"].dtype).gate_gradient
    assert relative_error(found["d_log_decay"][:, 0], expected) <= limit


@every_backend
def test_runs_compose_as_affine_maps_of_the_state(backend) -> None:
    """A run is S -> A S + b: A from the identity with no values, b from zero."""
    inputs = draw_for(backend, DeltaRuleCase(name="x", T=40, H=1, K=5, V=5))
    zeros = torch.zeros_like(inputs["write_value"])
    _, A = delta(
        {**inputs, "write_value": zeros, "initial_state": torch.eye(5, dtype=zeros.dtype).expand(1, 1, 5, 5)}, backend
    )
    _, b = delta({**inputs, "initial_state": None}, backend)
    _, state = delta(inputs, backend)
    ops.assert_close(A @ inputs["initial_state"] + b, state)


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=ops.NATIVE), "chunk"])
@pytest.mark.parametrize(("keys", "beta"), [("correlated", 1.0), ("identical", 1.0), ("gaussian", 2.0)])
def test_a_long_run_in_float32_does_not_drift(backend, keys, beta) -> None:
    """Hard keys, next to no decay, two thousand tokens: the last outputs are as good as the table asks of any."""
    case = DeltaRuleCase(name="x", T=2048, H=1, K=16, V=4, keys=keys, gate="slow", beta=beta)
    inputs = draw(case)
    inputs["log_decay"] = inputs["log_decay"] / 100
    o, state = delta(inputs, backend)
    o_64, state_64 = delta(ops.in_float64(inputs), "reference")
    ops.assert_close(o[:, -64:], o_64[:, -64:])
    ops.assert_close(state, state_64)
