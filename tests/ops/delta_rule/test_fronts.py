"""The named members of the family: each is the delta rule with its own inputs, and they meet where they should."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.ops import comba, delta_rule, gated_delta_rule, gated_delta_rule_decode, gdn2, kda, kda_core, ssd
from support import ops
from support.delta_rule import Inputs, widest

Result = dict[str, Tensor]
B, T, H, HV, K, V = 2, 40, 2, 4, 8, 6
FRONTS = ("kda", "gated_delta_rule", "gdn2", "comba", "ssd")


def inputs(dtype: torch.dtype = torch.float64, **changes: Any) -> Inputs:
    """Return q, k, v, both kinds of decay and a strength."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    drawn = {
        "q": F.normalize(normal(B, T, H, K), dim=-1),
        "k": F.normalize(normal(B, T, H, K), dim=-1),
        "v": normal(B, T, HV, V),
        "vector": F.logsigmoid(normal(B, T, HV, K)),
        "scalar": F.logsigmoid(normal(B, T, HV)),
        "beta": normal(B, T, HV).sigmoid(),
        "other": normal(B, T, HV).sigmoid(),
        "initial_state": normal(B, HV, K, V),
    }
    return {**{name: x.to(dtype) for name, x in drawn.items()}, **changes}


def outcome(function: Callable[..., tuple[Tensor, Tensor]], x: Inputs) -> Result:
    """Return the results and gradients of function(x)."""
    outputs, gradients = ops.run_with_gradients(lambda **a: function(a), x)
    return {"o": outputs[0], "final_state": outputs[1], **gradients}


def assert_same(found: Result, expected: Result) -> None:
    assert found.keys() == expected.keys()
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-10, atol=1e-11, msg=name)


def used(x: Inputs, *names: str) -> Inputs:
    return {name: x[name] for name in (*names, "initial_state")}


def core(x: Inputs, erase: Tensor | None, write: Tensor, decay: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return delta_rule(x["q"], x["k"], erase, write, decay, initial_state=x["initial_state"], **options)


def key(x: Inputs, gate: Tensor) -> Tensor:
    """Return gate * k on value heads."""
    return gate * x["k"].repeat_interleave(HV // H, 2)


def test_kda_erases_and_writes_with_one_strength() -> None:
    x = used(inputs(), "q", "k", "v", "vector", "beta")
    found = outcome(lambda x: kda(x["q"], x["k"], x["v"], x["vector"], x["beta"], initial_state=x["initial_state"]), x)
    beta = lambda x: x["beta"].unsqueeze(-1)  # noqa: E731
    assert_same(found, outcome(lambda x: core(x, key(x, beta(x)), beta(x) * x["v"], x["vector"]), x))


def test_gated_delta_rule_is_kda_with_equal_channels() -> None:
    x = used(inputs(), "q", "k", "v", "scalar", "beta")
    rest = lambda x: {"initial_state": x["initial_state"]}  # noqa: E731
    found = outcome(lambda x: gated_delta_rule(x["q"], x["k"], x["v"], x["scalar"], x["beta"], **rest(x)), x)
    spread = lambda x: x["scalar"].unsqueeze(-1).expand(-1, -1, -1, K)  # noqa: E731
    assert_same(found, outcome(lambda x: kda(x["q"], x["k"], x["v"], spread(x), x["beta"], **rest(x)), x))


def test_gdn2_with_both_gates_equal_to_the_strength_is_kda() -> None:
    x = used(inputs(), "q", "k", "v", "vector", "beta")
    rest = lambda x: {"initial_state": x["initial_state"]}  # noqa: E731

    def tied(x: Inputs) -> tuple[Tensor, Tensor]:
        b, w = (x["beta"].unsqueeze(-1).expand(-1, -1, -1, size) for size in (K, V))
        return gdn2(x["q"], x["k"], x["v"], x["vector"], b, w, **rest(x))

    assert_same(outcome(tied, x), outcome(lambda x: kda(x["q"], x["k"], x["v"], x["vector"], x["beta"], **rest(x)), x))


def test_the_strengths_gradient_is_the_sum_of_the_gates() -> None:
    """d_beta = sum_i db_i + sum_j dw_j, the gates' gradients taken apart."""
    x = inputs()
    x |= {"b": x["beta"].unsqueeze(-1).expand(-1, -1, -1, K), "w": x["beta"].unsqueeze(-1).expand(-1, -1, -1, V)}
    apart = outcome(lambda x: gdn2(x["q"], x["k"], x["v"], x["vector"], x["b"], x["w"]), without_state(x, "b", "w"))
    tied = outcome(lambda x: kda(x["q"], x["k"], x["v"], x["vector"], x["beta"]), without_state(x, "beta"))
    torch.testing.assert_close(apart["b"].sum(-1) + apart["w"].sum(-1), tied["beta"], rtol=1e-10, atol=1e-11)


def without_state(x: Inputs, *names: str) -> Inputs:
    return {name: x[name] for name in ("q", "k", "v", "vector", *names)}


def test_gdn2_takes_an_erase_gate_a_key_head() -> None:
    x = inputs()
    gate, write = torch.rand(B, T, H, K).double(), torch.rand(B, T, HV, V).double()
    front = gdn2(x["q"], x["k"], x["v"], x["vector"], gate, write)
    spread = gdn2(x["q"], x["k"], x["v"], x["vector"], gate.repeat_interleave(2, 2), write)
    torch.testing.assert_close(front, spread)


def test_gdn2_that_erases_nothing_and_writes_all_is_gla() -> None:
    x = inputs()
    zero, one = torch.zeros(B, T, H, K).double(), torch.ones(B, T, HV, V).double()
    found = gdn2(x["q"], x["k"], x["v"], x["vector"], zero, one, scale=1.0)
    torch.testing.assert_close(found, ssd(x["q"], x["k"], x["v"], x["vector"]))


@pytest.mark.parametrize("read", ["pre", "post"])
def test_comba_erases_with_a_strength_of_its_own(read) -> None:
    x = used(inputs(), "q", "k", "v", "scalar", "beta", "other")
    rest = lambda x: {"initial_state": x["initial_state"], "read": read}  # noqa: E731
    call = lambda x: comba(x["q"], x["k"], x["v"], x["scalar"], x["beta"], x["other"], **rest(x))  # noqa: E731
    plain = lambda x: core(  # noqa: E731
        x, key(x, x["other"].unsqueeze(-1)), x["beta"].unsqueeze(-1) * x["v"], x["scalar"], read=read
    )
    assert_same(outcome(call, x), outcome(plain, x))


def test_comba_with_erase_strength_alpha_beta_is_the_gated_delta_rule() -> None:
    x = used(inputs(), "q", "k", "v", "scalar", "beta")
    rest = lambda x: {"initial_state": x["initial_state"]}  # noqa: E731

    def call(x: Inputs) -> tuple[Tensor, Tensor]:
        return comba(x["q"], x["k"], x["v"], x["scalar"], x["beta"], x["scalar"].exp() * x["beta"], **rest(x))

    assert_same(
        outcome(call, x),
        outcome(lambda x: gated_delta_rule(x["q"], x["k"], x["v"], x["scalar"], x["beta"], **rest(x)), x),
    )


def test_comba_whose_query_is_corrected_by_the_whole_key_reads_nothing() -> None:
    """Undecayed, at full strength, with q = k and delta = 1 the query is zero."""
    x = inputs()
    ones, zeros = torch.ones(B, T, HV).double(), torch.zeros(B, T, HV).double()
    o, state = comba(x["k"] - x["k"], x["k"], x["v"], zeros, ones, ones)
    assert torch.equal(o, torch.zeros_like(o))
    assert state.abs().max() > 0


@pytest.mark.parametrize("decay", ["vector", "scalar"])
def test_ssd_erases_nothing_and_leaves_the_query_unscaled(decay) -> None:
    x = used(inputs(), "q", "k", "v", decay)
    found = outcome(lambda x: ssd(x["q"], x["k"], x["v"], x[decay], initial_state=x["initial_state"]), x)
    assert_same(found, outcome(lambda x: core(x, None, x["v"], x[decay], scale=1.0), x))


def test_a_state_entry_of_ssd_is_a_filter_of_order_one() -> None:
    a, b = -torch.rand(1, 50, 1).double(), torch.randn(1, 50, 1, 1).double()
    one = torch.ones(1, 50, 1, 1).double()
    o, _ = ssd(one, one, b, a)
    y, expected = torch.zeros(1).double(), []
    for t in range(50):
        y = a[0, t].exp() * y + b[0, t, 0]
        expected.append(y)
    torch.testing.assert_close(o.flatten(), torch.cat(expected))


def front_call(name: str, dtype: torch.dtype, **options: Any) -> tuple[Tensor, Tensor]:
    x = inputs(dtype)
    qkv, beta = (x["q"], x["k"], x["v"]), x["beta"]
    gates = (beta.unsqueeze(-1).expand(-1, -1, -1, K), beta.unsqueeze(-1).expand(-1, -1, -1, V))
    calls: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "kda": lambda: kda(*qkv, x["vector"], beta, **options),
        "gated_delta_rule": lambda: gated_delta_rule(*qkv, x["scalar"], beta, **options),
        "gdn2": lambda: gdn2(*qkv, x["vector"], *gates, **options),
        "comba": lambda: comba(*qkv, x["scalar"], beta, beta, **options),
        "ssd": lambda: ssd(*qkv, x["scalar"], **options),
    }
    return calls[name]()


@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
@pytest.mark.parametrize("name", FRONTS)
def test_output_has_the_dtype_of_the_values(name, dtype) -> None:
    o, state = front_call(name, dtype)
    assert o.dtype == dtype
    assert o.shape == (B, T, HV, V)
    assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("backend", ops.backends("delta_rule"))
@pytest.mark.parametrize("name", FRONTS)
def test_options_reach_the_delta_rule(name, backend) -> None:
    """Scale, state and packing; the backends agree on all of it."""
    dtype = widest("delta_rule", backend)
    plain, state = front_call(name, dtype, backend=backend, scale=1.0)
    scaled, _ = front_call(name, dtype, backend=backend, scale=3.0)
    ops.assert_close(scaled, 3 * plain)
    started, _ = front_call(name, dtype, backend=backend, scale=1.0, initial_state=state)
    assert not torch.allclose(started, plain)
    with pytest.raises(ValueError, match=r"B is 2 with cu_seqlens"):
        front_call(name, dtype, backend=backend, cu_seqlens=torch.tensor([0, T]))


@pytest.mark.parametrize("decay", ["vector", "scalar"])
@pytest.mark.parametrize("backend", ops.backends("delta_rule_decode"))
def test_decoding_equals_the_prompt(decay, backend) -> None:
    dtype = widest("delta_rule", backend)
    x = inputs(dtype)
    front = kda if decay == "vector" else gated_delta_rule
    o, state = front(x["q"], x["k"], x["v"], x[decay], x["beta"], initial_state=x["initial_state"])
    pool, slots = torch.randn(5, HV, K, V, dtype=dtype), torch.tensor([3, 1])
    pool[slots] = x["initial_state"]
    for t in range(T):
        now = [x[name][:, t] for name in ("q", "k", "v", decay, "beta")]
        o_t = gated_delta_rule_decode(*now, pool, slots, backend=backend)
        ops.assert_close(o_t, o[:, t])
    ops.assert_close(pool[slots], state)


def test_kda_core_is_kda_after_norm_gate_and_strength() -> None:
    """The fused form against the operators a layer would otherwise call."""
    from kimi_linear.ops import forget_gate, l2_norm

    x = inputs()
    logits, A_log, dt_bias = torch.randn(B, T, HV, K).double(), torch.rand(HV).double(), torch.randn(HV * K).double()
    found = kda_core(3 * x["q"], 2 * x["k"], x["v"], logits, x["scalar"], A_log, dt_bias)
    g = forget_gate(logits, A_log, dt_bias)
    q, k = l2_norm(3 * x["q"]), l2_norm(2 * x["k"])
    torch.testing.assert_close(found, kda(q, k, x["v"], g, x["scalar"].sigmoid()), rtol=1e-9, atol=1e-11)
