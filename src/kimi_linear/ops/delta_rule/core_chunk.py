"""`kda_core` in chunks: normalisation, gates and write strength are formed tile by tile, inside the chunked form.

Nothing of the size of the sequence is kept but the raw inputs. Letters as in `chunk.py`; x the gate's logits, u = x +
dt_bias, a = exp(A_log), b the write strength.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kimi_linear.ops.autocast import without_autocast
from kimi_linear.ops.delta_rule.autograd import save_inputs, saved_inputs
from kimi_linear.ops.delta_rule.chunk import Settings, chunk_backward, chunk_forward
from kimi_linear.ops.delta_rule.decode import advance
from kimi_linear.ops.delta_rule.layout import Tile, expand_heads, sum_heads, wide_dtype
from kimi_linear.ops.delta_rule.scores import Terms

# Inside the root, added to the sum of squares, as in the released checkpoint.
NORM_EPS = 1e-6


def normalise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x / sqrt(sum x^2 + eps) and the reciprocal root, over the last axis."""
    root = (x.square().sum(-1, keepdim=True) + NORM_EPS).rsqrt()
    return x * root, root


def normalise_backward(d_y: Tensor, y: Tensor, root: Tensor) -> Tensor:
    """dx = r (dy - y (y dy))."""
    return root * (d_y - y * (y * d_y).sum(-1, keepdim=True))


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), written out: see `softplus`."""
    return x.neg().exp_().add_(1).reciprocal_()


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)).

    Written out because torch's own softplus and sigmoid treat the last elements of a tensor, those that do not fill a
    vector register, in another way than the rest: a row's result would depend on how many rows are beside it.
    """
    return x.abs().neg_().exp_().log1p_().add_(x.clamp(min=0))


def log_decay_of(u: Tensor, rate: Tensor, lower_bound: float | None) -> Tensor:
    """g = -a softplus(u), or lower_bound * sigmoid(a u)."""
    return softplus(u) * -rate if lower_bound is None else sigmoid(rate * u) * lower_bound


def log_decay_backward(
    d_g: Tensor, u: Tensor, g: Tensor, rate: Tensor, lower_bound: float | None
) -> tuple[Tensor, Tensor]:
    """Return dx and the summands of dA_log."""
    if lower_bound is None:
        return -rate * sigmoid(u) * d_g, d_g * g
    # g (1 - g / bound) is bound * s (1 - s).
    d_x = rate * d_g * g * (1 - g / lower_bound)
    return d_x, d_x * u


@dataclass
class CoreTerms(Terms):
    """The terms, and what their gradients need on the way back to the raw inputs."""

    q_root: Tensor
    k_root: Tensor
    u: Tensor
    strength: Tensor
    v: Tensor


class CoreSource:
    """Raw q, k [B, T, H, K], v [B, T, HV, V], gate logits x [B, T, HV, K], write strength logits [B, T, HV]."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor,
        beta: Tensor,
        A_log: Tensor | None,
        dt_bias: Tensor | None,
        lower_bound: float | None,
        beta_scale: float,
    ) -> None:
        self.q, self.k, self.value, self.gate, self.beta = q, k, v, gate, beta.unsqueeze(-1)
        self.key_dim, self.dtype = q.shape[-1], wide_dtype(v.dtype)
        HV = v.shape[2]
        ones = torch.ones(HV, dtype=self.dtype, device=v.device)
        self.rate = (ones if A_log is None else A_log.to(self.dtype).exp()).view(HV, 1, 1)
        self.shift = None if dt_bias is None else dt_bias.to(self.dtype).view(HV, 1, -1)
        self.lower_bound, self.beta_scale = lower_bound, beta_scale
        self.gradients: list[Tensor] = []
        self.d_A_log = torch.zeros_like(ones)
        self.d_dt_bias = torch.zeros(HV, self.key_dim, dtype=self.dtype, device=v.device)

    def allocate(self) -> None:
        """Allocate the gradients of (q, k, v, gate, beta), contiguous, in the inputs' dtypes."""
        inputs = (self.q, self.k, self.value, self.gate, self.beta)
        self.gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]

    def load(self, tile: Tile) -> CoreTerms:
        """Return the tile's terms."""
        HV = self.value.shape[2]
        q, q_root = normalise(tile.load(self.q, self.dtype))
        k, k_root = normalise(tile.load(self.k, self.dtype))
        k = expand_heads(k, HV, 1)
        v, u = tile.load(self.value, self.dtype), tile.load(self.gate, self.dtype)
        if self.shift is not None:
            u += self.shift
        g = log_decay_of(u, self.rate, self.lower_bound)
        valid = tile.valid(g.device)
        if valid is not None:
            # The gate of a row without a token is not the gate of a zero logit: it must not decay the state.
            g.masked_fill_(~valid[:, None, :, None], 0)
        strength = sigmoid(tile.load(self.beta, self.dtype)).mul_(self.beta_scale)
        rows = [x.flatten(0, 1) for x in (expand_heads(q, HV, 1), k, strength * k, strength * v, g)]
        return CoreTerms(rows[0], rows[1], rows[2], rows[3], rows[4], q_root, k_root, u, strength, v)

    def store(self, tile: Tile, terms: Terms, gradients: Terms) -> None:
        """Take the gradients back to the raw inputs and write them; add to those of A_log and dt_bias."""
        assert isinstance(terms, CoreTerms)
        assert gradients.e is not None
        HV, H = self.value.shape[2], self.q.shape[2]

        def by_head(x: Tensor) -> Tensor:
            return x.unflatten(0, (-1, HV))

        # Every head of a group holds the same normalised query and key: take the first.
        first = slice(None, None, HV // H)
        k, strength = by_head(terms.k), terms.strength
        d_e, d_z = by_head(gradients.e), by_head(gradients.z)
        d_q = sum_heads(by_head(gradients.q), H, 1)
        d_k = sum_heads(by_head(gradients.k).addcmul(strength, d_e), H, 1)
        d_strength = (k * d_e).sum(-1, keepdim=True) + (terms.v * d_z).sum(-1, keepdim=True)
        d_g, g = by_head(gradients.g), by_head(terms.g)
        valid = tile.valid(d_g.device)
        if valid is not None:
            d_g = d_g.masked_fill(~valid[:, None, :, None], 0)
        d_x, d_rate = log_decay_backward(d_g, terms.u, g, self.rate, self.lower_bound)
        self.d_A_log += d_rate.sum((0, 2, 3))
        self.d_dt_bias += d_x.sum((0, 2))
        found = (
            normalise_backward(d_q, by_head(terms.q)[:, first], terms.q_root),
            normalise_backward(d_k, k[:, first], terms.k_root),
            strength * d_z,
            d_x,
            d_strength * strength * (1 - strength / self.beta_scale),
        )
        for target, gradient in zip(self.gradients, found, strict=True):
            tile.store(target, gradient)


@torch.library.custom_op("kimi_linear::kda_core_chunk", mutates_args=())
def kda_core_chunk(
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
) -> tuple[Tensor, Tensor]:
    """Run the chunked form from the raw inputs; see `kimi_linear.ops.delta_rule.kda_core`."""
    source = CoreSource(q, k, v, gate, beta, A_log, dt_bias, lower_bound, beta_scale)
    with without_autocast(q.device):
        return chunk_forward(source, Settings(scale, "post", False), initial_state, cu_seqlens)


@torch.library.custom_op("kimi_linear::kda_core_chunk_backward", mutates_args=())
def kda_core_chunk_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of (q, k, v, gate, beta, A_log or empty, dt_bias or empty, initial state)."""
    source = CoreSource(q, k, v, gate, beta, A_log, dt_bias, lower_bound, beta_scale)
    source.allocate()
    settings = Settings(scale, "post", False)
    with without_autocast(q.device):
        d_initial = chunk_backward(source, settings, d_o, d_final, initial_state, cu_seqlens)
    d_q, d_k, d_v, d_x, d_beta = source.gradients
    return (
        d_q,
        d_k,
        d_v,
        d_x,
        d_beta.squeeze(-1),
        q.new_empty(0) if A_log is None else source.d_A_log.to(A_log.dtype),
        q.new_empty(0) if dt_bias is None else source.d_dt_bias.view_as(dt_bias).to(dt_bias.dtype),
        d_initial,
    )


@kda_core_chunk.register_fake
def _fake(
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
) -> tuple[Tensor, Tensor]:
    N = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = v.new_empty(N, v.shape[2], q.shape[-1], v.shape[3], dtype=wide_dtype(v.dtype))
    return torch.empty_like(v, memory_format=torch.contiguous_format), state


@kda_core_chunk_backward.register_fake
def _fake_backward(
    d_o: Tensor,
    d_final: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    empty = q.new_empty(0)
    inputs = (q, k, v, gate, beta, empty if A_log is None else A_log, empty if dt_bias is None else dt_bias, d_final)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)


def _formula(ctx: Any, d_o: Tensor, d_final: Tensor) -> tuple[Any, ...]:
    inputs = saved_inputs(ctx)
    *gradients, d_A_log, d_dt_bias, d_state = kda_core_chunk_backward(d_o, d_final, *inputs)
    optional = ((inputs[5], d_A_log), (inputs[6], d_dt_bias))
    given = [None if x is None else gradient for x, gradient in optional]
    return (*gradients, *given, None, None, None, None if inputs[10] is None else d_state, None)


kda_core_chunk.register_autograd(_formula, setup_context=save_inputs)


@torch.library.custom_op("kimi_linear::kda_core_decode_chunk", mutates_args=("pool",))
def kda_core_decode_chunk(
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
    """Advance one token from the raw inputs, in place; see `kimi_linear.ops.delta_rule.kda_core_decode`."""
    dtype, HV = wide_dtype(v.dtype), v.shape[1]
    q_unit, k_unit = (normalise(x.to(dtype))[0] for x in (q, k))
    u = gate.to(dtype) if dt_bias is None else gate.to(dtype) + dt_bias.to(dtype).view(HV, -1)
    rate = u.new_ones(HV, 1) if A_log is None else A_log.to(dtype).exp().view(HV, 1)
    strength = (sigmoid(beta.to(dtype)) * beta_scale).unsqueeze(-1)
    erase = strength * expand_heads(k_unit, HV, 1)
    g = log_decay_of(u, rate, lower_bound)
    return advance(q_unit, k_unit, erase, strength * v.to(dtype), g, pool, slots, scale, "post").to(v.dtype)


@kda_core_decode_chunk.register_fake
def _fake_decode(
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
    return torch.empty_like(v, memory_format=torch.contiguous_format)
