"""The incumbent's call signatures: recorded as data, and every call equal to our own operators."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.base.errors import ConfigError, ShapeError
from kimi_linear.compat import fla
from kimi_linear.ops import forget_gate, gated_delta_rule, kda, kda_core, l2_norm
from support import ops
from support.fla import GDN, HV, KDA, B, H, K, T, V, assert_same, call, draw, parameters

NEEDED = inspect.Parameter.empty
QKV = {"q": NEEDED, "k": NEEDED, "v": NEEDED}
STATE = {"scale": None, "initial_state": None, "output_final_state": False, "use_qk_l2norm_in_kernel": False}
BETA = {"use_beta_sigmoid_in_kernel": False, "allow_neg_eigval": False}
# Name -> default, in order, of flash-linear-attention 0.6; after "*" by keyword alone.
SIGNATURES: dict[str, dict[str, Any]] = {
    "chunk_kda": {
        **QKV, "g": NEEDED, "beta": NEEDED, **STATE, "use_gate_in_kernel": False, **BETA,
        "safe_gate": False, "lower_bound": None, "disable_recompute": False, "return_intermediate_states": False,
        "state_v_first": False, "cu_seqlens": None, "cu_seqlens_cpu": None, "cp_context": None,
        "*": None, "A_log": None, "dt_bias": None, "chunk_size": 64,
    },
    "fused_recurrent_kda": {
        **QKV, "g": NEEDED, "beta": NEEDED, "A_log": None, "dt_bias": None, **STATE, "use_gate_in_kernel": False,
        **BETA, "lower_bound": None, "state_v_first": False, "cu_seqlens": None,
    },
    "chunk_gated_delta_rule": {
        **QKV, "g": NEEDED, "beta": NEEDED, **STATE, **BETA, "state_v_first": False, "cu_seqlens": None,
        "cu_seqlens_cpu": None, "chunk_indices": None, "cp_context": None,
        "*": None, "use_gate_in_kernel": False, "A_log": None, "dt_bias": None, "chunk_size": 64,
    },
    "fused_recurrent_gated_delta_rule": {
        **QKV, "g": None, "gk": None, "gv": None, "beta": None, **STATE, "use_gate_in_kernel": False, "A_log": None,
        "dt_bias": None, **BETA, "state_v_first": False, "cu_seqlens": None,
    },
    "fused_kda_gate": {
        "g": NEEDED, "A_log": None, "dt_bias": None, "lower_bound": None, "output_dtype": torch.float32,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_names_order_and_defaults_are_the_incumbents(name) -> None:
    parameters = [p for p in inspect.signature(getattr(fla, name)).parameters.values() if p.kind != p.VAR_KEYWORD]
    found: dict[str, Any] = {}
    for p in parameters:
        if p.kind == p.KEYWORD_ONLY and "*" not in found:
            found["*"] = None
        found[p.name] = p.default
    assert list(found.items()) == list(SIGNATURES[name].items())


def test_every_public_name_is_recorded() -> None:
    assert set(fla.__all__) == set(SIGNATURES)


def plain(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    return kda if name in KDA else gated_delta_rule


every = pytest.mark.parametrize("name", [*KDA, *GDN])


@every
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
def test_a_call_is_our_own_operators(name, dtype) -> None:
    x = draw(name, dtype)
    o, state = call(name, **x)
    expected, expected_state = plain(name)(x["q"], x["k"], x["v"], x["g"], x["beta"])
    assert state is None
    assert torch.equal(o, expected)
    assert o.dtype == dtype
    assert o.shape == x["v"].shape
    o, state = call(name, **x, output_final_state=True)
    assert torch.equal(o, expected)
    assert torch.equal(state, expected_state)
    assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@every
def test_arguments_may_be_given_by_position(name) -> None:
    x = draw(name)
    order = [p for p in SIGNATURES[name] if p != "*"]
    state = torch.randn(B, HV, K, V)
    values = {**x, "scale": 0.25, "initial_state": state, "output_final_state": True}
    last = order.index("output_final_state") + 1
    assert_same(call(name, *[values.get(p) for p in order[:last]]), call(name, **values))


@every
def test_scale_and_state_and_packing_are_passed_on(name) -> None:
    x = {n: y[:1] for n, y in draw(name).items()}
    cu, state = torch.tensor([0, 30, 30, T]), torch.randn(3, HV, K, V)
    found = call(name, **x, scale=0.5, initial_state=state, cu_seqlens=cu, output_final_state=True)
    rest = {"scale": 0.5, "initial_state": state, "cu_seqlens": cu}
    expected = plain(name)(x["q"], x["k"], x["v"], x["g"], x["beta"], **rest)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    # An empty sequence ends as it began.
    assert torch.equal(found[1][1], state[1])


@every
def test_v_first_states_are_the_same_states_transposed(name) -> None:
    x, state = draw(name), torch.randn(B, HV, K, V)
    o, final = call(name, **x, initial_state=state, output_final_state=True)
    swapped = state.transpose(2, 3).contiguous()
    o_v, final_v = call(name, **x, initial_state=swapped, output_final_state=True, state_v_first=True)
    assert torch.equal(o, o_v)
    assert torch.equal(final.transpose(2, 3), final_v)
    assert final_v.is_contiguous()


@every
def test_the_old_spelling_of_v_first_works_and_warns(name) -> None:
    x = draw(name)
    expected = call(name, **x, output_final_state=True, state_v_first=True)
    with pytest.warns(DeprecationWarning, match=r"transpose_state_layout is now state_v_first") as caught:
        found = getattr(fla, name)(**x, output_final_state=True, transpose_state_layout=True)
    assert caught[0].filename == __file__
    assert_same(found, expected)
    with pytest.raises(ConfigError, match=r"are one option; give only state_v_first"):
        call(name, **x, state_v_first=True, transpose_state_layout=True)


@every
def test_norm_in_the_kernel(name) -> None:
    x = draw(name)
    x["q"], x["k"] = 3 * x["q"], x["k"] * torch.rand(B, T, H, 1)
    x["k"][:, ::7] = 0
    found = call(name, **x, use_qk_l2norm_in_kernel=True)
    # 1e-6 inside the root.
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (x["q"], x["k"]))
    assert_same(found, call(name, **{**x, "q": q, "k": k}))


@every
@pytest.mark.parametrize("negative", [False, True])
def test_sigmoid_in_the_kernel(name, negative) -> None:
    x = draw(name)
    logits = torch.logit(x["beta"])
    found = call(name, **{**x, "beta": logits}, use_beta_sigmoid_in_kernel=True, allow_neg_eigval=negative)
    assert_same(found, call(name, **{**x, "beta": x["beta"] * (2 if negative else 1)}))


@every
@pytest.mark.parametrize("bias", [False, True])
def test_gate_in_the_kernel(name, bias) -> None:
    x, given = draw(name), parameters(name)
    if not bias:
        given["dt_bias"] = None
    logits = torch.randn(x["g"].shape)
    found = call(name, **{**x, "g": logits}, use_gate_in_kernel=True, **given)
    shift = 0 if not bias else given["dt_bias"].view(HV, -1).squeeze(-1)
    rate = given["A_log"].exp().view(HV, *[1] * (x["g"].dim() - 3))
    assert_same(found, call(name, **{**x, "g": -rate * F.softplus(logits + shift)}))


@pytest.mark.parametrize("name", GDN)
def test_a_gate_a_head_is_one_even_where_there_are_as_many_tokens_as_heads(name) -> None:
    """[B, T, HV] with T = HV and no bias could be read as [.., HV, K]."""
    x = {n: y[:, :HV] for n, y in draw(name).items()}
    A_log, logits = parameters(name)["A_log"], torch.randn(B, HV, HV)
    found = call(name, **{**x, "g": logits}, use_gate_in_kernel=True, A_log=A_log)
    assert_same(found, call(name, **{**x, "g": -A_log.exp() * F.softplus(logits)}))


@pytest.mark.parametrize("name", KDA)
@pytest.mark.parametrize("rate", [False, True])
def test_the_bound_chooses_the_bounded_gate(name, rate) -> None:
    x, given = draw(name), parameters(name)
    if not rate:
        given["A_log"] = None
    logits = torch.randn(B, T, HV, K)
    found = call(name, **{**x, "g": logits}, use_gate_in_kernel=True, lower_bound=-5.0, **given)
    factor = given["A_log"].exp().view(HV, 1) if rate else 1
    g = -5 * torch.sigmoid(factor * (logits + given["dt_bias"].view(HV, K)))
    assert_same(found, call(name, **{**x, "g": g}))


def test_safe_gate_is_a_promise_and_chooses_nothing() -> None:
    x, given = draw("chunk_kda"), parameters("chunk_kda")
    softplus = fla.chunk_kda(**x, use_gate_in_kernel=True, **given)
    bounded = fla.chunk_kda(**x, use_gate_in_kernel=True, lower_bound=-5.0, **given)
    promised = fla.chunk_kda(**x, use_gate_in_kernel=True, lower_bound=-5.0, safe_gate=True, **given)
    assert torch.equal(bounded[0], promised[0])
    assert not torch.allclose(softplus[0], bounded[0])
    # Without the gate in the kernel nothing is computed from the bound.
    assert torch.equal(fla.chunk_kda(**x)[0], fla.chunk_kda(**x, safe_gate=True, lower_bound=-5.0)[0])


@pytest.mark.parametrize("name", KDA)
def test_all_flags_together_are_the_fused_operator(name) -> None:
    x, given = draw(name), parameters(name)
    x["g"], x["beta"] = torch.randn(B, T, HV, K), torch.randn(B, T, HV)
    flags = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    # As the released checkpoint keeps it.
    rate = given["A_log"].view(1, 1, HV, 1)
    found = call(name, **x, A_log=rate, dt_bias=given["dt_bias"], **flags, output_final_state=True)
    expected = kda_core(x["q"], x["k"], x["v"], x["g"], x["beta"], given["A_log"], given["dt_bias"])
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_every_argument_in_its_dtype(name, dtype) -> None:
    given = parameters(name)
    flags = {"use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "use_gate_in_kernel": True}
    x = {**draw(name, dtype), **given, "initial_state": torch.randn(B, HV, K, V)}
    outputs, gradients = ops.run_with_gradients(lambda **a: call(name, **a, **flags, output_final_state=True), x)
    assert len(outputs) == 2
    for argument, gradient in gradients.items():
        assert gradient.dtype == x[argument].dtype
        assert gradient.shape == x[argument].shape
        assert gradient.abs().max() > 0, argument


@every
def test_no_input_is_modified(name) -> None:
    flags = {"use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "use_gate_in_kernel": True}
    x = {**draw(name), **parameters(name), "initial_state": torch.randn(B, HV, K, V)}
    ops.assert_inputs_unchanged(lambda **a: call(name, **a, **flags, output_final_state=True), x)


def test_float64_is_float64_throughout() -> None:
    x, given = draw("chunk_kda", torch.float64), {n: y.double() for n, y in parameters("chunk_kda").items()}
    flags = {"use_beta_sigmoid_in_kernel": True, "use_gate_in_kernel": True, "output_final_state": True}
    found = fla.chunk_kda(**x, **given, **flags)
    decay = forget_gate(x["g"], given["A_log"], given["dt_bias"])
    expected = kda(x["q"], x["k"], x["v"], decay, x["beta"].sigmoid(), backend="reference")
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


# Intermediate states.


def starts(x: dict[str, Tensor], step: int, state: Tensor) -> Tensor:
    """Return the states at the chunks' starts, from calls that end there."""
    cuts = ({n: y[:, :t] for n, y in x.items()} for t in range(step, x["q"].shape[1], step))
    found = [state, *(fla.chunk_kda(**cut, initial_state=state, output_final_state=True)[1] for cut in cuts)]
    return torch.stack(found, 1)


@pytest.mark.parametrize("step", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_intermediate_states_are_those_at_the_start_of_every_chunk(step, dtype) -> None:
    x = draw("chunk_kda", dtype)
    state = torch.randn(B, HV, K, V, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.inference_mode():
        found = fla.chunk_kda(**x, initial_state=state, return_intermediate_states=True, chunk_size=step)
        whole = fla.chunk_kda(**x, initial_state=state)
        expected = starts(x, step, state)
    assert len(found) == 3
    assert found[1] is None
    assert_same(found[0], whole[0])
    assert found[2].shape == (B, -(-T // step), HV, K, V)
    assert found[2].dtype == dtype
    assert_same(found[2], expected.to(dtype))


def test_intermediate_states_of_packed_sequences_follow_each_other() -> None:
    x = {n: y[:1] for n, y in draw("chunk_kda").items()}
    cu = torch.tensor([0, 0, 33, 34, T])
    state = torch.randn(4, HV, K, V)
    options = {"return_intermediate_states": True, "chunk_size": 32, "output_final_state": True, "state_v_first": True}
    o, final, middle = fla.chunk_kda(**x, cu_seqlens=cu, initial_state=state.transpose(2, 3), **options)
    expected, expected_final = kda(x["q"], x["k"], x["v"], x["g"], x["beta"], initial_state=state, cu_seqlens=cu)
    assert_same((o, final), (expected, expected_final.transpose(2, 3)))
    per_sequence = []
    for n, (start, end) in enumerate([(0, 33), (33, 34), (34, T)], start=1):
        cut = {name: y[:, start:end] for name, y in x.items()}
        per_sequence.append(starts(cut, 32, state[n : n + 1]))
    assert_same(middle, torch.cat(per_sequence, 1).transpose(3, 4))


def test_intermediate_states_of_no_tokens_and_no_state() -> None:
    x = {n: y[:, :0] for n, y in draw("chunk_kda", torch.float64).items()}
    o, final, middle = fla.chunk_kda(**x, return_intermediate_states=True, output_final_state=True)
    assert o.shape == (B, 0, HV, V)
    assert torch.equal(final, torch.zeros(B, HV, K, V, dtype=torch.float64))
    assert middle.shape == (B, 0, HV, K, V)


def test_intermediate_states_are_for_inference() -> None:
    x, given = draw("chunk_kda"), parameters("chunk_kda")
    wanting = [{"v": x["v"].clone().requires_grad_()}, {"A_log": given["A_log"].requires_grad_()}]
    for leaf in wanting:
        options = {**x, **given, **leaf, "use_gate_in_kernel": True, "return_intermediate_states": True}
        with pytest.raises(ConfigError, match=r"return_intermediate_states is for inference"):
            fla.chunk_kda(**options)
        with torch.no_grad():
            fla.chunk_kda(**options)


@pytest.mark.parametrize(
    ("offsets", "states", "message"),
    [
        ([0, 40], 1, r"from 0 to 40"),
        ([0, 50, 40, T], 3, r"falls from 50 to 40"),
        ([0, T], 2, r"initial_state is \[2, "),
    ],
)
def test_intermediate_states_check_the_pack(offsets, states, message) -> None:
    x = {n: y[:1] for n, y in draw("chunk_kda").items()}
    options = {"cu_seqlens": torch.tensor(offsets), "initial_state": torch.zeros(states, HV, K, V)}
    with pytest.raises(ShapeError, match=message):
        fla.chunk_kda(**x, **options, return_intermediate_states=True)


# A strength per value channel.


@pytest.mark.parametrize("raw", [False, True], ids=["plain", "raw"])
def test_a_strength_a_value_channel_is_one_call_a_channel(raw) -> None:
    """Each value channel is a call of its own, with its own strength."""
    name = "fused_recurrent_kda"
    x = {n: y.clone() for n, y in draw(name).items()}
    beta, state = torch.rand(B, T, HV, V), torch.randn(B, HV, K, V)
    options: dict[str, Any] = {"output_final_state": True}
    if raw:
        flags = ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval")
        options |= dict.fromkeys(flags, True) | parameters(name)
    o, final = fla.fused_recurrent_kda(**{**x, "beta": beta}, initial_state=state, **options)
    for channel in range(V):
        one = {**x, "v": x["v"][..., channel : channel + 1], "beta": beta[..., channel]}
        found = fla.fused_recurrent_kda(**one, initial_state=state[..., channel : channel + 1], **options)
        assert_same((o[..., channel : channel + 1], final[..., channel : channel + 1]), found)


def test_a_strength_a_value_channel_has_gradients_and_takes_v_first_states() -> None:
    x = {**draw("fused_recurrent_kda", torch.float64), "initial_state": torch.randn(B, HV, V, K).double()}
    x["beta"] = torch.rand(B, T, HV, V).double()
    x = {n: y[:, :3] if n != "initial_state" else y for n, y in x.items()}
    outputs, gradients = ops.run_with_gradients(
        lambda **a: fla.fused_recurrent_kda(**a, state_v_first=True, output_final_state=True), x
    )
    assert outputs[1].shape == (B, HV, V, K)
    assert all(gradients[n].shape == x[n].shape for n in x)


def test_equal_strengths_of_all_value_channels_are_one_strength() -> None:
    x = draw("fused_recurrent_kda")
    spread = x["beta"].unsqueeze(-1).expand(-1, -1, -1, V)
    assert_same(fla.fused_recurrent_kda(**{**x, "beta": spread}), fla.fused_recurrent_kda(**x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": torch.rand(B, T, HV, V + 1)}, r"beta is \[2, 70, 4, 7\], expected \[2, 70, 4\] or \[2, 70, 4, 6\]"),
        ({"initial_state": torch.zeros(B, HV, V, K)}, r"initial_state is \[2, 4, 6, 8\], expected \[any, 4, 8, 6\]"),
    ],
)
def test_a_strength_a_value_channel_is_checked(change, message) -> None:
    x = {**draw("fused_recurrent_kda"), "beta": torch.rand(B, T, HV, V), **change}
    with pytest.raises(ShapeError, match=message):
        fla.fused_recurrent_kda(**x)


# The recurrent gated delta rule's decays.


def test_a_decay_a_key_channel_is_kda_and_both_decays_add_up() -> None:
    x = draw("fused_recurrent_kda")
    g, gk = x["g"][..., 0], x.pop("g")
    rest = {"q": x["q"], "k": x["k"], "v": x["v"], "beta": x["beta"]}
    run = fla.fused_recurrent_gated_delta_rule
    assert_same(run(**rest, gk=gk)[0], kda(x["q"], x["k"], x["v"], gk, x["beta"])[0])
    assert_same(run(**rest, g=g, gk=gk)[0], kda(x["q"], x["k"], x["v"], gk + g.unsqueeze(-1), x["beta"])[0])


def test_no_decay_and_no_strength_are_the_delta_rule() -> None:
    x = draw("fused_recurrent_gated_delta_rule")
    found = fla.fused_recurrent_gated_delta_rule(x["q"], x["k"], x["v"])
    ones = torch.ones(B, T, HV)
    assert_same(found[0], gated_delta_rule(x["q"], x["k"], x["v"], 0 * ones, ones)[0])


# The gate alone.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_alone_is_in_float32(dtype) -> None:
    logits, given = torch.randn(B, T, HV, K).to(dtype), parameters("chunk_kda")
    found = fla.fused_kda_gate(logits, given["A_log"].view(1, 1, HV, 1), given["dt_bias"])
    expected = -given["A_log"].exp().view(HV, 1) * F.softplus(logits.float() + given["dt_bias"].view(HV, K))
    assert found.dtype == torch.float32
    assert_same(found, expected)
    assert fla.fused_kda_gate(logits, given["A_log"], output_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert_same(fla.fused_kda_gate(logits, lower_bound=-5.0), -5 * torch.sigmoid(logits.float()))


def test_it_composes_as_a_layer_would_call_it() -> None:
    """Norm outside, gate outside: the same numbers as all inside."""
    x, given = draw("chunk_kda"), parameters("chunk_kda")
    logits = torch.randn(B, T, HV, K)
    inside = fla.chunk_kda(**{**x, "g": logits}, use_gate_in_kernel=True, use_qk_l2norm_in_kernel=True, **given)
    g = fla.fused_kda_gate(logits, given["A_log"], given["dt_bias"])
    outside = fla.chunk_kda(l2_norm(x["q"]), l2_norm(x["k"]), x["v"], g, x["beta"])
    assert_same(inside, outside)
