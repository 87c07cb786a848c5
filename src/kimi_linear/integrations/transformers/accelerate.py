"""transformers' own `kimi_linear` network on our operators: what `accelerate` puts in place of what.

    causal_conv1d_fn, causal_conv1d_update              short_conv, short_conv_decode
    chunk_, recurrent_kimi_delta_attention              kda, gated_delta_rule_decode
    KimiLinearForgetGate, RMSNorm, RMSNormGated         forget_gate, rms_norm, gated_rms_norm
    KimiLinearExperts                                   grouped_mlp
    KimiLinearAttention                                 mla_attention, mla_decode on the cached latents

Each replacement looks at its call and hands to the original what is not its own: tensors off the CPU, another
activation, a mask it does not read; and what is too small to gain. Recurrent states are [B, H, K, V] in float32 on
both sides.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from kimi_linear.base.errors import BackendError
from kimi_linear.ops import (
    forget_gate,
    gated_delta_rule_decode,
    gated_rms_norm,
    grouped_mlp,
    kda,
    l2_norm,
    mla_attention,
    mla_decode,
    rms_norm,
    short_conv,
    short_conv_decode,
)

_MODULE = "transformers.models.kimi_linear.modeling_kimi_linear"
_WRITTEN_FOR = "5.23"
_SILU = ("silu", "swish")
# Below so many choices an expert, taking w1 and w3 out of transformers' one matrix costs more than the products save.
_CHOICES_AN_EXPERT = 16
# States of fewer elements are done sooner by transformers' few plain operators than by a native call.
_SMALLEST_STATE = 2**18

Function = Callable[..., Any]


def _conv(
    original: Function,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> Any:
    offsets = kwargs.get("cu_seqlens")
    unknown = offsets is None and kwargs.get("seq_idx") is not None
    if hidden_states.device.type != "cpu" or bias is not None or activation not in _SILU or unknown:
        return original(hidden_states, weight, bias, activation, **kwargs)
    y, _ = short_conv(hidden_states.transpose(1, 2), weight, cu_seqlens=offsets)
    return y.transpose(1, 2)


def _conv_update(
    original: Function,
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Any:
    one = hidden_states.shape[-1] == 1 and conv_state.shape[-1] == weight.shape[-1] > 1
    if hidden_states.device.type != "cpu" or bias is not None or activation not in _SILU or not one or _records():
        return original(hidden_states, conv_state, weight, bias, activation)
    # The cache is as wide as the kernel: its oldest column is never read again, and is kept as transformers has it.
    history = conv_state[..., 1:].contiguous()
    conv_state[..., 0] = history[..., 0]
    y = short_conv_decode(hidden_states.squeeze(-1), weight, history, _rows(history))
    conv_state[..., 1:] = history
    return y.unsqueeze(-1)


def _chunk_kda(
    original: Function,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> Any:
    offsets = kwargs.get("cu_seqlens")
    if query.device.type != "cpu" or (offsets is None and kwargs.get("seq_idx") is not None):
        return original(
            *(query, key, value, g, beta, chunk_size, initial_state, output_final_state, use_qk_l2norm_in_kernel),
            **kwargs,
        )
    if use_qk_l2norm_in_kernel:
        query, key = _unit(query), _unit(key)
    state = None if initial_state is None else initial_state.float()
    o, state = kda(query, key, value, g, beta, initial_state=state, cu_seqlens=offsets)
    return o, state if output_final_state else None


def _recurrent_kda(
    original: Function,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    output_final_state: bool,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> Any:
    tensors = (query, key, value, g, beta)
    foreign = query.device.type != "cpu" or query.shape[1] != 1 or _records()
    if foreign or initial_state is None or initial_state.numel() < _SMALLEST_STATE:
        return original(*tensors, initial_state, output_final_state, use_qk_l2norm_in_kernel, **kwargs)
    if use_qk_l2norm_in_kernel:
        query, key = _unit(query), _unit(key)
    # The caller's state stays as it is: transformers copies the new one into its cache itself.
    state = initial_state.float().clone(memory_format=torch.contiguous_format)
    q, k, v, log_decay, strength = (x.squeeze(1) for x in (query, key, value, g, beta))
    o = gated_delta_rule_decode(q, k, v, log_decay, strength, state, _rows(state))
    return o.unsqueeze(1), state if output_final_state else None


def _forget_gate(original: Function, self: Any, hidden_states: Tensor) -> Any:
    if hidden_states.device.type != "cpu" or _is_step(hidden_states):
        return original(self, hidden_states)
    logits = self.f_b_proj(self.f_a_proj(hidden_states)).unflatten(-1, (self.num_heads, self.head_dim))
    return forget_gate(logits, self.A_log.flatten(), self.dt_bias)


def _rms_norm(original: Function, self: Any, hidden_states: Tensor) -> Any:
    # With a weight of another dtype transformers returns the wider of the two.
    mixed = hidden_states.dtype != self.weight.dtype
    if hidden_states.device.type != "cpu" or mixed or _is_step(hidden_states):
        return original(self, hidden_states)
    return rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)


def _gated_rms_norm(original: Function, self: Any, hidden_states: Tensor, gate: Tensor | None = None) -> Any:
    foreign = hidden_states.device.type != "cpu" or self.activation != "sigmoid"
    if foreign or gate is None or _is_step(hidden_states):
        return original(self, hidden_states, gate)
    return gated_rms_norm(hidden_states, gate, self.weight, eps=self.variance_epsilon)


def _experts(original: Function, self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
    on_cpu = hidden_states.device.type == self.gate_up_proj.device.type == "cpu"
    # Experts spread over processes mark the choices of others with an index of their own.
    if not on_cpu or self._is_expert_parallel or self.config.hidden_act not in _SILU:
        return original(self, hidden_states, top_k_index, top_k_weights)
    if top_k_index.numel() < _CHOICES_AN_EXPERT * self.num_experts:
        return original(self, hidden_states, top_k_index, top_k_weights)
    w1, w3 = self.gate_up_proj.unflatten(1, (2, -1)).unbind(1)
    return grouped_mlp(hidden_states, w1, w3, self.down_proj, top_k_weights, top_k_index)


def _attention(
    original: Function,
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Any:
    T = hidden_states.shape[1]
    decodes = past_key_values is not None and T == 1 and not _records() and _is_readable(attention_mask)
    if not _is_plain(self, hidden_states) or not (decodes or attention_mask is None) or "is_causal" in kwargs:
        return original(self, hidden_states, attention_mask, past_key_values=past_key_values, **kwargs)
    q = self.q_proj(hidden_states).unflatten(-1, (self.num_heads, self.qk_head_dim))
    latent, key_rope = self.kv_a_proj_with_mqa(hidden_states).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
    latent = self.kv_a_layernorm(latent)
    if past_key_values is not None:
        cached = past_key_values.update(latent.unsqueeze(1), key_rope.unsqueeze(1), self.layer_idx)
        latent, key_rope = (x.squeeze(1) for x in cached)
    weight, nope_dim = self.kv_b_proj.weight, self.qk_nope_head_dim
    if decodes:
        latent, key_rope, lengths, table = _positions(latent, key_rope, attention_mask)
        o = mla_decode(
            q.squeeze(1), latent, key_rope, lengths, weight, nope_dim=nope_dim, scale=self.scaling, block_table=table
        ).unsqueeze(1)
    else:
        offsets = kwargs.get("cu_seqlens")
        o = mla_attention(q, latent, key_rope, weight, nope_dim=nope_dim, scale=self.scaling, cu_seqlens=offsets)
    return self.o_proj(o.flatten(-2)), None


def _is_plain(attention: Any, hidden_states: Tensor) -> bool:
    """Return whether an attention layer is one our operators compute: no adapter or hook on the matrix they read."""
    expand = attention.kv_b_proj
    return (
        hidden_states.device.type == expand.weight.device.type == "cpu"
        and type(expand) is nn.Linear
        and not expand._forward_hooks
        and not expand._forward_pre_hooks
        and attention.q_lora_rank is None
        and attention.num_key_value_groups == 1
        and attention.config._attn_implementation == "sdpa"
        and not (attention.training and attention.attention_dropout)
    )


def _is_readable(mask: Tensor | None) -> bool:
    return mask is None or (mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1] == 1)


def _positions(latent: Tensor, key_rope: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return latents, key parts, lengths and block table that name the positions a mask [B, 1, 1, S] shows."""
    B, S, _ = latent.shape
    if mask is None:
        return latent, key_rope, torch.full((B,), S), None
    # Pages of one token, the visible ones first: the softmax does not mind the order of what it sums over.
    shown = mask[:, 0, -1].expand(B, S)
    table = shown.int().argsort(dim=1, descending=True) + S * torch.arange(B)[:, None]
    return latent.reshape(B * S, 1, -1), key_rope.reshape(B * S, 1, -1), shown.sum(1), table.int()


def _is_step(x: Tensor) -> bool:
    # [B, T, ...] of one token: too little for a native call to be worth its price.
    return x.shape[1] == 1


def _records() -> bool:
    # A step in place has no gradient.
    return torch.is_grad_enabled()


def _rows(pool: Tensor) -> Tensor:
    return torch.arange(pool.shape[0])


def _unit(x: Tensor) -> Tensor:
    # In float32 as transformers has it, not rounded to the dtype of the model.
    return l2_norm(x.float())


@dataclass(frozen=True)
class _Patch:
    """What takes the place of `owner.name`, and the arguments that the original must have for it."""

    owner: str | None
    name: str
    run: Function
    arguments: str

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        return self.name if self.owner is None else f"{self.owner}.{self.name}"

    def target(self, module: ModuleType) -> Any:
        return module if self.owner is None else getattr(module, self.owner, None)


_KDA = "query key value g beta"
_PATCHES = (
    _Patch(None, "causal_conv1d_fn", _conv, "hidden_states weight bias activation kwargs"),
    _Patch(None, "causal_conv1d_update", _conv_update, "hidden_states conv_state weight bias activation"),
    _Patch(
        None,
        "chunk_kimi_delta_attention",
        _chunk_kda,
        f"{_KDA} chunk_size initial_state output_final_state use_qk_l2norm_in_kernel kwargs",
    ),
    _Patch(
        None,
        "recurrent_kimi_delta_attention",
        _recurrent_kda,
        f"{_KDA} initial_state output_final_state use_qk_l2norm_in_kernel kwargs",
    ),
    _Patch("KimiLinearForgetGate", "forward", _forget_gate, "self hidden_states"),
    _Patch("KimiLinearRMSNorm", "forward", _rms_norm, "self hidden_states"),
    _Patch("KimiLinearRMSNormGated", "forward", _gated_rms_norm, "self hidden_states gate"),
    _Patch("KimiLinearExperts", "forward", _experts, "self hidden_states top_k_index top_k_weights"),
    _Patch("KimiLinearAttention", "forward", _attention, "self hidden_states attention_mask past_key_values kwargs"),
)
# (where, name, original) of everything replaced now; empty while nothing is.
_replaced: list[tuple[Any, str, Function]] = []


class Acceleration:
    """What `accelerate` returns: call `undo()`, or use it in a `with` block, to have transformers' own code back.

    Args:
        is_first: Whether this call put the operators in place. A block undoes only what its own call did.
    """

    def __init__(self, is_first: bool) -> None:
        self._is_first = is_first

    def undo(self) -> None:
        """Put back every original; nothing happens where that was done before."""
        while _replaced:
            setattr(*_replaced.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_first:
            self.undo()


def accelerate() -> Acceleration:
    """Make transformers' own `kimi_linear` models compute with our operators on the CPU, in training and generation.

    It holds for every model of that type in the process, loaded before or after. Prompts and training run the chunked
    native kernels; a step of generation runs the recurrent one and attends to the cached latents without expanding
    them; sequences packed with `cu_seqlens` work. Results are transformers' up to rounding. Tensors on other devices
    take transformers' code, and so does what an operator does not compute. A second call changes nothing.

    Returns:
        A handle to undo it.

    Raises:
        BackendError: transformers is missing, or its network is not the one this was written for; nothing is changed.

    Example:
        >>> from kimi_linear.integrations.transformers import accelerate
        >>> with accelerate():  # doctest: +SKIP
        ...     model.generate(**inputs)
    """
    if _replaced:
        return Acceleration(is_first=False)
    module = _network()
    found = []
    for patch in _PATCHES:
        owner = patch.target(module)
        original = vars(owner).get(patch.name) if owner is not None else None
        if original is None or _arguments(original) != patch.arguments:
            raise BackendError(
                f"accelerate: {patch.place} of the installed transformers is {_described(original)}, expected the "
                f"arguments {patch.arguments.replace(' ', ', ')}; install transformers {_WRITTEN_FOR}."
            )
        found.append((owner, patch.name, original, patch.run))
    for owner, name, original, run in found:
        setattr(owner, name, _with_original(run, original))
        _replaced.append((owner, name, original))
    return Acceleration(is_first=True)


def _arguments(function: Function) -> str:
    return " ".join(inspect.signature(function).parameters)


def _described(function: Function | None) -> str:
    return "missing" if function is None else f"called with {_arguments(function).replace(' ', ', ')}"


def _with_original(run: Function, original: Function) -> Function:
    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return run(original, *args, **kwargs)

    return replacement


def _network() -> ModuleType:
    try:
        return importlib.import_module(_MODULE)
    except ImportError as error:
        raise BackendError(
            f"accelerate: transformers with a kimi_linear network of its own cannot be imported ({error}); install "
            f"transformers {_WRITTEN_FOR}."
        ) from error
