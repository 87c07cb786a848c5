"""The `triton` backend of the delta rule: when it can run, and its operators. Imports triton when it first runs."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kimi_linear.base import env
from kimi_linear.ops.checks import check_slots_values
from kimi_linear.ops.delta_rule.autograd import fake_forward, save_inputs, saved_inputs
from kimi_linear.ops.delta_rule.decode import refuse_gradients
from kimi_linear.ops.delta_rule.pool import unread
from kimi_linear.ops.registry import Call
from kimi_linear.ops.triton.backend import refuse_device

if TYPE_CHECKING:
    from kimi_linear.ops.delta_rule.triton.inputs import Inputs

# Channels of keys and of values a program can hold.
MOST_CHANNELS = 256


def refuse(call: Call) -> list[str]:
    """Refuse what the kernels do not compute."""
    reasons = refuse_device(call)
    if max(call.sizes.get("K", 0), call.sizes.get("V", 0)) > MOST_CHANNELS:
        reasons.append(f"K or V is above {MOST_CHANNELS}")
    return reasons


def refuse_decode(call: Call) -> list[str]:
    """Refuse what the kernels do not compute, and gradients, for the calls in place."""
    return refuse_gradients(call) + refuse(call)


def _sizes(q: Tensor) -> tuple[int, int]:
    """Return B and T."""
    return q.shape[0], q.shape[1]


def _flat(x: Tensor | None) -> Tensor | None:
    """Return [B, T, ..] as [B T, ..], contiguous."""
    return None if x is None else x.flatten(0, 1).contiguous()


def _inputs(
    q: Tensor, k: Tensor, erase_key: Tensor | None, value: Tensor, g: Tensor, beta: Tensor | None, **others: Any
) -> "Inputs":
    from kimi_linear.ops.delta_rule.triton.inputs import Inputs

    flat = [_flat(x) for x in (q, k, erase_key, value, g, beta)]
    return Inputs(*flat, **{name: x.contiguous() if isinstance(x, Tensor) else x for name, x in others.items()})  # type: ignore[arg-type]


def _forward(inputs: "Inputs", cu_seqlens: Tensor | None, B: int, T: int, keep: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return o, the final states and what is kept: short sequences token by token, others in chunks."""
    from kimi_linear.ops.delta_rule.triton import launch, tokens

    if keep == "inputs" and tokens.suits(T, cu_seqlens):
        o, final = tokens.forward(inputs, B, T)
        return o, final, o.new_empty(0, dtype=torch.uint8)
    return launch.forward(inputs, cu_seqlens, B, T, keep)


@torch.library.custom_op("kimi_linear::delta_rule_triton", mutates_args=())
def delta_rule_triton(
    q: Tensor,
    k: Tensor,
    erase_key: Tensor | None,
    write_value: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    read: str,
    beta: Tensor | None,
    keep: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernels; see `kimi_linear.ops.delta_rule.delta_rule` for the arguments. Returns what is kept, too."""
    inputs = plain_inputs(q, k, erase_key, write_value, log_decay, beta, scale, initial_state, read)
    o, final, kept = _forward(inputs, cu_seqlens, *_sizes(q), keep)
    return o.view_as(write_value), final, kept


@torch.library.custom_op("kimi_linear::delta_rule_triton_backward", mutates_args=())
def delta_rule_triton_backward(
    d_o: Tensor,
    d_final: Tensor,
    q: Tensor,
    k: Tensor,
    erase_key: Tensor | None,
    write_value: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    read: str,
    beta: Tensor | None,
    keep: str,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of (q, k, erase_key or empty, write_value, log_decay, initial state, beta or empty)."""
    from kimi_linear.ops.delta_rule.triton import launch

    inputs = plain_inputs(q, k, erase_key, write_value, log_decay, beta, scale, initial_state, read)
    gradients = d_o.flatten(0, 1).contiguous(), d_final.contiguous()
    found = launch.backward(inputs, cu_seqlens, *_sizes(q), *gradients, kept, keep)
    given = {"q": q, "k": k, "erase": erase_key, "value": write_value, "g": log_decay, "beta": beta}
    d = {name: q.new_empty(0) if x is None else _given(found[name]).view_as(x) for name, x in given.items()}
    return d["q"], d["k"], d["erase"], d["value"], d["g"], _given(found["initial"]), d["beta"]


def _given(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def plain_inputs(
    q: Tensor,
    k: Tensor,
    erase_key: Tensor | None,
    write_value: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    read: str,
) -> "Inputs":
    """Return the kernels' inputs of a `delta_rule` call."""
    pre = read == "pre"
    tensors = (q, k, erase_key, write_value, log_decay, beta)
    return _inputs(*tensors, initial=initial_state, scale=scale, pre=pre, A_log=None, dt_bias=None)


@torch.library.custom_op("kimi_linear::kda_core_triton", mutates_args=())
def kda_core_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float | None,
    beta_scale: float,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    keep: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernels from the raw inputs; see `kimi_linear.ops.delta_rule.kda_core`. Returns what is kept, too."""
    inputs = core_inputs(q, k, v, gate, beta, A_log, dt_bias, lower_bound, beta_scale, scale, initial_state)
    o, final, kept = _forward(inputs, cu_seqlens, *_sizes(q), keep)
    return o.view_as(v), final, kept


@torch.library.custom_op("kimi_linear::kda_core_triton_backward", mutates_args=())
def kda_core_triton_backward(
    d_o: Tensor,
    d_final: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float | None,
    beta_scale: float,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    keep: str,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of (q, k, v, gate, beta, A_log or empty, dt_bias or empty, initial state)."""
    from kimi_linear.ops.delta_rule.triton import launch

    inputs = core_inputs(q, k, v, gate, beta, A_log, dt_bias, lower_bound, beta_scale, scale, initial_state)
    gradients = d_o.flatten(0, 1).contiguous(), d_final.contiguous()
    found = launch.backward(inputs, cu_seqlens, *_sizes(q), *gradients, kept, keep)
    given = {"q": q, "k": k, "value": v, "g": gate, "beta": beta, "A_log": A_log, "dt_bias": dt_bias}
    d = [q.new_empty(0) if x is None else _given(found[name]).view_as(x) for name, x in given.items()]
    return *d, _given(found["initial"])  # type: ignore[return-value]


def core_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float | None,
    beta_scale: float,
    scale: float,
    initial_state: Tensor | None,
) -> "Inputs":
    """Return the kernels' inputs of a `kda_core` call."""
    parameters = {"A_log": A_log, "dt_bias": dt_bias, "initial": initial_state}
    plain = {"scale": scale, "lower_bound": lower_bound, "beta_scale": beta_scale, "raw": True}
    return _inputs(q, k, None, v, gate, beta, **parameters, **plain)


@delta_rule_triton.register_fake
def _fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, erase_key, value, log_decay, scale, initial_state, cu_seqlens, read, beta, keep = inputs
    given = (q, k, erase_key, value, log_decay, beta, scale, initial_state, read)
    return *fake_forward(*inputs[:9]), _fake_kept(plain_inputs, given, cu_seqlens, keep)


@kda_core_triton.register_fake
def _fake_core(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, gate = inputs[:4]
    initial_state, cu_seqlens, keep = inputs[10:]
    shapes = fake_forward(q, k, None, v, gate, 1.0, initial_state, cu_seqlens, "post")
    return *shapes, _fake_kept(core_inputs, inputs[:11], cu_seqlens, keep)


def _fake_kept(make: Callable[..., "Inputs"], given: tuple[Any, ...], cu_seqlens: Tensor | None, keep: str) -> Tensor:
    q: Tensor = given[0]
    size = 0
    if keep != "inputs":
        from kimi_linear.ops.delta_rule.triton.plan import kept_bytes

        size = kept_bytes(make(*given), cu_seqlens, *_sizes(q), keep)
    return q.new_empty(size, dtype=torch.uint8)


def _like(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    empty = next(x for x in tensors if x is not None).new_empty(0)
    return tuple(torch.empty_like(empty if x is None else x, memory_format=torch.contiguous_format) for x in tensors)


@delta_rule_triton_backward.register_fake
def _fake_backward(d_o: Tensor, d_final: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return _like(*inputs[:5], d_final, inputs[9])


@kda_core_triton_backward.register_fake
def _fake_core_backward(d_o: Tensor, d_final: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return _like(*inputs[:7], d_final)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    kept = output[2]
    ctx.mark_non_differentiable(kept)
    save_inputs(ctx, (*inputs, kept), output)


def _formula(ctx: Any, d_o: Tensor, d_final: Tensor, _: Tensor) -> tuple[Any, ...]:
    inputs = saved_inputs(ctx)
    *d, d_initial, d_beta = delta_rule_triton_backward(d_o, d_final, *inputs)
    d[2] = None if inputs[2] is None else d[2]
    last = None if inputs[9] is None else d_beta
    return *d, None, None if inputs[6] is None else d_initial, None, None, last, None


def _core_formula(ctx: Any, d_o: Tensor, d_final: Tensor, _: Tensor) -> tuple[Any, ...]:
    inputs = saved_inputs(ctx)
    *d, d_initial = kda_core_triton_backward(d_o, d_final, *inputs)
    d = [None if given is None else x for given, x in zip(inputs[:7], d, strict=True)]
    return *d, None, None, None, None if inputs[10] is None else d_initial, None, None


delta_rule_triton.register_autograd(_formula, setup_context=_save)
kda_core_triton.register_autograd(_core_formula, setup_context=_save)


def run_delta_rule(*inputs: Any) -> tuple[Tensor, Tensor]:
    """Run `delta_rule_triton`, keeping for a backward what KIMI_LINEAR_TRITON_KEEP says."""
    o, final, _ = delta_rule_triton(*inputs, _keep(inputs))
    return o, final


def run_kda_core(*inputs: Any) -> tuple[Tensor, Tensor]:
    """Run `kda_core_triton`, keeping for a backward what KIMI_LINEAR_TRITON_KEEP says."""
    o, final, _ = kda_core_triton(*inputs, _keep(inputs))
    return o, final


def _keep(inputs: tuple[Any, ...]) -> str:
    needed = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
    return str(env.read("KIMI_LINEAR_TRITON_KEEP")) if needed else "inputs"


@torch.library.custom_op("kimi_linear::delta_rule_decode_triton", mutates_args=("pool",))
def delta_rule_decode_triton(
    q: Tensor,
    k: Tensor,
    erase_key: Tensor | None,
    write_value: Tensor,
    log_decay: Tensor,
    pool: Tensor,
    slots: Tensor,
    scale: float,
    read: str,
) -> Tensor:
    """Advance one token; see `kimi_linear.ops.delta_rule.delta_rule_decode`."""
    given = [None if x is None else x.contiguous() for x in (q, k, erase_key, write_value, log_decay)]
    return _decode(given, pool, slots, beta=None, A_log=None, dt_bias=None, scale=scale, pre=read == "pre")


@torch.library.custom_op("kimi_linear::kda_core_decode_triton", mutates_args=("pool",))
def kda_core_decode_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    lower_bound: float | None,
    beta_scale: float,
    scale: float,
) -> Tensor:
    """Advance one token; see `kimi_linear.ops.delta_rule.kda_core_decode`."""
    given = [q.contiguous(), k.contiguous(), None, v.contiguous(), gate.contiguous()]
    others = [None if x is None else x.contiguous() for x in (beta, A_log, dt_bias)]
    parameters = dict(zip(("beta", "A_log", "dt_bias"), others, strict=True))
    plain = {"lower_bound": lower_bound, "beta_scale": beta_scale, "scale": scale, "raw": True}
    return _decode(given, pool, slots, **parameters, **plain)


def _decode(given: list[Tensor | None], pool: Tensor, slots: Tensor, **others: Any) -> Tensor:
    from kimi_linear.ops.delta_rule.triton.decode import decode
    from kimi_linear.ops.delta_rule.triton.inputs import Inputs

    # Where the host does not look, a slot outside of the pool is skipped.
    if not unread(slots):
        check_slots_values(slots, pool.shape[0])
    q, k, erase, value, g = given
    inputs = Inputs(_given(q), _given(k), erase, _given(value), _given(g), initial=None, **others)
    return decode(inputs, pool, slots.contiguous())


@delta_rule_decode_triton.register_fake
def _fake_decode(*inputs: Any) -> Tensor:
    return torch.empty_like(inputs[3], memory_format=torch.contiguous_format)


@kda_core_decode_triton.register_fake
def _fake_core_decode(*inputs: Any) -> Tensor:
    return torch.empty_like(inputs[2], memory_format=torch.contiguous_format)
