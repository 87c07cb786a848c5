"""What the incumbent's users expect to be refused, each by a ValueError, and what only warns."""

import warnings

import pytest
import torch

from kimi_linear.base.errors import BackendError, ConfigError, DtypeError, ShapeError
from kimi_linear.compat import fla
from support.fla import GDN, HV, KDA, B, H, K, T, V, call, draw, parameters

every = pytest.mark.parametrize("name", [*KDA, *GDN])


@every
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"allow_neg_eigval": True}, ConfigError, r"needs use_beta_sigmoid_in_kernel"),
        ({"use_gate_in_kernel": True}, ConfigError, r"use_gate_in_kernel needs A_log \[HV\]"),
        ({"head_first": True}, ConfigError, r"head_first is not supported; pass \[B, T, H, K\]"),
        ({"cu_seqlens": torch.tensor([0, T])}, ShapeError, r"B is 2 with cu_seqlens, expected 1"),
        ({"initial_state": torch.zeros(3, HV, K, V)}, ShapeError, r"initial_state is \[3, 4, 8, 6\], expected \[2, "),
        ({"initial_state": torch.zeros(3)}, ShapeError, r"initial_state is \[3\], expected"),
        ({"initial_state": torch.zeros(3), "state_v_first": True}, ShapeError, r"initial_state is \[3\], expected"),
        ({"initial_state": torch.zeros(B, HV, K, V).bfloat16()}, DtypeError, r"expected torch.float32"),
        ({"ssm_state_indices": torch.arange(B)}, ConfigError, r"ssm_state_indices is not supported; for a pool"),
        ({"inplace_final_state": True}, ConfigError, r"inplace_final_state is not supported; for a pool"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_contradictions_are_refused(name, options, error, message) -> None:
    with pytest.raises(error, match=message) as caught:
        call(name, **draw(name), **options)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", ["chunk_kda", "chunk_gated_delta_rule"])
def test_a_context_parallel_group_is_refused(name) -> None:
    with pytest.raises(BackendError, match=r"cp_context is not supported; split the sequence yourself"):
        call(name, **draw(name), cp_context=object())


@pytest.mark.parametrize(("name", "sizes"), [("chunk_kda", (32, 64)), ("chunk_gated_delta_rule", (16, 32, 64))])
def test_chunk_size_is_a_hint_with_few_values(name, sizes) -> None:
    x = draw(name)
    for size in sizes:
        assert torch.equal(call(name, **x, chunk_size=size)[0], call(name, **x)[0])
    for size in (0, 8, 48, 128):
        with pytest.raises(ConfigError, match=rf"chunk_size is {size}, expected"):
            call(name, **x, chunk_size=size)


@pytest.mark.parametrize("bound", [None, 0.0, -5.5, 1.0])
def test_safe_gate_needs_a_bound_it_can_hold(bound) -> None:
    x, given = draw("chunk_kda"), parameters("chunk_kda")
    with pytest.raises(ConfigError, match=rf"safe_gate needs lower_bound in \[-5, 0\), given {bound}"):
        fla.chunk_kda(**x, **given, use_gate_in_kernel=True, safe_gate=True, lower_bound=bound)


@every
def test_too_wide_keys_are_refused(name) -> None:
    x = draw(name)
    x["q"] = x["k"] = torch.zeros(B, T, H, 257)
    with pytest.raises(ShapeError, match=r"K is 257, expected at most 256"):
        call(name, **x)


@every
def test_value_heads_come_in_whole_groups(name) -> None:
    x = draw(name)
    x["q"] = x["k"] = torch.zeros(B, T, 3, K)
    with pytest.raises(ShapeError, match=r"HV is 4 and H is 3, expected HV to be a multiple of H"):
        call(name, **x)


def test_other_requirements_of_the_gates() -> None:
    x = draw("fused_recurrent_gated_delta_rule")
    run = fla.fused_recurrent_gated_delta_rule
    with pytest.raises(ConfigError, match=r"gv, a decay per value channel, is not supported"):
        run(**x, gv=torch.zeros(B, T, HV, V))
    with pytest.raises(ConfigError, match=r"use_gate_in_kernel needs g"):
        run(x["q"], x["k"], x["v"], use_gate_in_kernel=True, A_log=torch.zeros(HV))
    with pytest.raises(ConfigError, match=r"A_log is None, expected \[HV\] with the softplus gate"):
        fla.fused_kda_gate(x["g"])


@every
def test_unknown_arguments_warn_and_change_nothing(name) -> None:
    x = draw(name)
    with pytest.warns(UserWarning, match=r"ignoring unknown arguments head_dim, speed") as caught:
        found = getattr(fla, name)(**x, speed=3, head_dim=8)
    assert caught[0].filename == __file__
    assert torch.equal(found[0], call(name, **x)[0])


@every
def test_harmless_old_arguments_are_silent(name) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(name, **draw(name), head_first=False)
