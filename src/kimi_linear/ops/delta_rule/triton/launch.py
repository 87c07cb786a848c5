"""From tensors to launches, forward and backward; `workspace_bytes` says what a call allocates beside its results."""

import math
from typing import Any

import torch
from torch import Tensor

from kimi_linear.ops.delta_rule.triton import gradients, prepare, serial
from kimi_linear.ops.delta_rule.triton.chunks import cut
from kimi_linear.ops.delta_rule.triton.inputs import NOTHING, WEIGHED, Inputs
from kimi_linear.ops.delta_rule.triton.tiles import tiles
from kimi_linear.ops.triton.launch import padded, start


class Run:
    """One call: its chunks, tiles, and workspace of factors."""

    def __init__(self, inputs: Inputs, cu_seqlens: Tensor | None, B: int, T: int) -> None:
        self.inputs = inputs
        N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.tiles = tiles(inputs, T, N, cu_seqlens is not None)
        self.chunks = cut(cu_seqlens, B, T, self.tiles.chunk, inputs.q.device)
        self.N, self.K, self.V = N, inputs.q.shape[2], inputs.value.shape[2]
        self.H, self.HV, self.HE = inputs.heads
        self.KP = padded(self.K)
        # Half precision works in bfloat16: what a chunk decays by leaves float16's range.
        self.dtype = torch.float32 if inputs.value.dtype == torch.float32 else torch.bfloat16
        self.rows = self.chunks.count * self.HV
        C, rows = self.tiles.chunk, self.rows
        self.q_factor, self.k_factor = (self.room(rows, C, self.KP) for _ in range(2))
        erases = inputs.flags["ERASE"] != NOTHING
        self.e_factor = self.room(rows, C, self.KP) if erases else None
        self.total = self.room(rows, self.KP, dtype=torch.float32)
        self.scores = self.room(rows, C, C)
        self.inverse = self.room(rows, C, C) if erases else None

    def room(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return uninitialised memory."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.inputs.q.device)

    def prepare(self) -> None:
        """Fill the factors, scores and inverses."""
        x, c, t = self.inputs, self.chunks, self.tiles
        start(
            *(prepare.prepare_kernel, c.count * self.HV),
            *(x.q, x.k, x.erase, x.g, x.beta, x.A_log, x.dt_bias),
            *(c.cu_seqlens, c.first, c.owner),
            *(self.q_factor, self.e_factor, self.k_factor, self.total, self.scores, self.inverse),
            *(x.lower_bound or 0.0, x.beta_scale, x.scale),
            *(c.sequences, self.H, self.HV, self.HE),
            **self.sizes(),
            **x.flags,
            num_warps=t.prepare_warps,
            num_stages=2,
        )

    def sizes(self) -> dict[str, int]:
        """Return the sizes the chunk-parallel kernels are compiled for."""
        return {"K": self.K, "KP": self.KP, "B": self.tiles.key_block, "C": self.tiles.chunk}

    def chain(
        self, o: Tensor | None, final: Tensor | None, states: Tensor | None = None, written: Tensor | None = None
    ) -> None:
        """Run the chunks one after the other: write o and the final states, or what the backward needs."""
        x, c, t, flags = self.inputs, self.chunks, self.tiles, self.inputs.flags
        start(
            *(serial.forward_kernel, self.chain_programs()),
            *(x.value, x.beta, self.q_factor, self.e_factor, self.k_factor, self.total, self.scores, self.inverse),
            *(x.initial, o, final, states, written),
            *(c.cu_seqlens, c.first, x.beta_scale, self.HV),
            **self.chain_sizes(),
            BETA=flags["BETA"],
            HAS_INITIAL=x.initial is not None,
            OUTPUT=o is not None,
            KEEP=states is not None,
            num_warps=t.chain_warps,
            num_stages=2,
        )

    def chain_programs(self) -> int:
        """Return how many programs the serial kernels have."""
        return self.N * self.HV * -(-self.V // self.tiles.chain_block)

    def chain_sizes(self) -> dict[str, Any]:
        """Return what the serial kernels are compiled for."""
        flags = self.inputs.flags
        sizes = {"K": self.K, "V": self.V, "KP": self.KP, "BV": self.tiles.chain_block, "C": self.tiles.chunk}
        return {**sizes, "ERASE": flags["ERASE"], "WIDE": flags["WIDE"]}


def forward(inputs: Inputs, cu_seqlens: Tensor | None, B: int, T: int) -> tuple[Tensor, Tensor]:
    """Return o [tokens, HV, V] and the final states [N, HV, K, V]: two launches."""
    run = Run(inputs, cu_seqlens, B, T)
    o = torch.empty_like(inputs.value)
    final = run.room(run.N, run.HV, run.K, run.V, dtype=torch.float32)
    run.prepare()
    run.chain(o, final)
    return o, final


def backward(
    inputs: Inputs, cu_seqlens: Tensor | None, B: int, T: int, d_o: Tensor, d_final: Tensor
) -> dict[str, Tensor | None]:
    """Return the gradients by the names of `Inputs`: five launches, one more for q, k, and sums in a fixed order."""
    run = Run(inputs, cu_seqlens, B, T)
    x, c, t, rows = inputs, run.chunks, run.tiles, run.rows
    states, d_states = (run.room(rows, run.K, run.V) for _ in range(2))
    written, d_z = (run.room(rows, t.chunk, run.V) for _ in range(2))
    d_initial = run.room(run.N, run.HV, run.K, run.V, dtype=torch.float32)
    run.prepare()
    run.chain(None, None, states, written)
    start(
        *(serial.reverse_kernel, run.chain_programs()),
        *(d_o, d_final, run.q_factor, run.e_factor, run.k_factor, run.total, run.scores, run.inverse),
        *(d_z, d_states, d_initial),
        *(c.cu_seqlens, c.first, run.HV),
        **run.chain_sizes(),
        num_warps=t.chain_warps,
        num_stages=2,
    )
    found = {
        name: None if given is None else torch.empty_like(given) for name, given in (("value", x.value), ("g", x.g))
    }
    parts = Parts(run)
    # The factors are spent: dP and dL go where P and M were.
    squares = run.scores, run.inverse, parts.diagonal, parts.norms
    _launch_scores(run, written, d_o, d_z, found["value"], squares, parts)
    _launch_collect(run, (written, states, d_o, d_z, d_states), squares, found["g"], parts)
    return {**found, "initial": d_initial, **parts.finish(found["g"])}


class Parts:
    """Memory for gradients a value head, or a block of channels, and for what the gradient kernels tell each other."""

    def __init__(self, run: Run) -> None:
        x, heads, tokens = run.inputs, run.HV, run.inputs.value.shape[0]
        self.run, blocks, flags = run, run.KP // run.tiles.key_block, run.inputs.flags
        self.q, self.k, self.erase = (
            None if given is None else run.room(tokens, heads, run.K, dtype=_part_dtype(run, given, normed))
            for given, normed in ((x.q, x.raw), (x.k, x.raw), (x.erase, False))
        )
        self.diagonal = run.room(run.rows, run.tiles.chunk, dtype=torch.float32)
        self.norms = run.room(run.rows, 2, run.tiles.chunk, dtype=torch.float32) if x.raw else None
        # The values' part, then those of the blocks of channels.
        strengths = blocks + 1 if flags["ERASE"] == WEIGHED else 1
        self.beta = None if x.beta is None else run.room(strengths, tokens, heads, dtype=torch.float32)
        self.decay = run.room(blocks, tokens, heads, dtype=torch.float32) if flags["SCALAR"] else None
        # Surplus chunks write nothing.
        self.rate = run.room(run.rows, blocks, dtype=torch.float32).zero_() if x.raw else None
        self.bias = run.room(run.rows, run.KP, dtype=torch.float32).zero_() if x.raw else None

    def finish(self, d_g: Tensor | None) -> dict[str, Tensor | None]:
        """Return the gradients of q, k, erase, beta, A_log and dt_bias; fill d_g where it is a sum over channels."""
        run, x = self.run, self.run.inputs
        if self.decay is not None:
            assert d_g is not None
            floor = math.log(gradients.forgotten.fn(x.flags["WIDE"]))
            d_g.copy_(self.decay.sum(0).masked_fill_(x.g < floor, 0.0))
        found: dict[str, Tensor | None] = {
            name: None if given is None else _finish(run, given, parts, normed)
            for name, given, parts, normed in (
                ("q", x.q, self.q, x.raw),
                ("k", x.k, self.k, x.raw),
                ("erase", x.erase, self.erase, False),
            )
        }
        found |= dict.fromkeys(("beta", "A_log", "dt_bias"))
        if x.beta is not None and self.beta is not None:
            strength = self.beta.sum(0)
            if x.raw:
                # 1 - sigmoid(x) would lose its digits near one.
                strength *= x.beta_scale * x.beta.float().sigmoid() * x.beta.float().neg().sigmoid()
            found["beta"] = strength.to(x.beta.dtype)
        if x.A_log is not None and self.rate is not None:
            found["A_log"] = self.rate.sum(1).view(run.chunks.count, run.HV).sum(0).to(x.A_log.dtype)
        if x.dt_bias is not None and self.bias is not None:
            bias = self.bias.view(run.chunks.count, run.HV, run.KP)[..., : run.K]
            found["dt_bias"] = bias.sum(0).reshape(-1).to(x.dt_bias.dtype)
        return found


def _launch_scores(
    run: Run, written: Tensor, d_o: Tensor, d_z: Tensor, d_value: Tensor | None, squares: tuple[Any, ...], parts: Parts
) -> None:
    x, c, t, flags = run.inputs, run.chunks, run.tiles, run.inputs.flags
    start(
        *(gradients.scores_kernel, run.rows),
        *(x.q, x.k, x.value, x.beta, c.cu_seqlens, c.first, c.owner, written, d_o, d_z),
        *(d_value, *squares, parts.beta, x.beta_scale, c.sequences, run.H, run.HV),
        **run.sizes(),
        V=run.V,
        BV=t.value_block,
        **{name: flags[name] for name in ("NORM", "BETA", "ERASE", "WIDE")},
        num_warps=t.gradient_warps,
        num_stages=2,
    )


def _launch_collect(
    run: Run, chain: tuple[Tensor, ...], squares: tuple[Any, ...], d_g: Tensor | None, parts: Parts
) -> None:
    x, c, t = run.inputs, run.chunks, run.tiles
    start(
        *(gradients.collect_kernel, run.rows * (run.KP // t.key_block)),
        *(x.q, x.k, x.erase, x.g, x.beta, x.A_log, x.dt_bias, c.cu_seqlens, c.first, c.owner),
        *(*chain, *squares),
        *(parts.q, parts.k, parts.erase, d_g, parts.beta, parts.decay, parts.rate, parts.bias),
        *(x.lower_bound or 0.0, x.beta_scale, x.scale),
        *(c.sequences, run.H, run.HV, run.HE, x.value.shape[0]),
        **run.sizes(),
        V=run.V,
        BV=t.value_block,
        **x.flags,
        num_warps=t.gradient_warps,
        num_stages=1,
    )


def _part_dtype(run: Run, given: Tensor, normed: bool) -> torch.dtype:
    return torch.float32 if normed or given.shape[1] != run.HV else given.dtype


def _finish(run: Run, given: Tensor, parts: Tensor | None, normed: bool) -> Tensor:
    """Return the gradient of q, k or e from its value heads' parts."""
    assert parts is not None
    tokens, heads, K = given.shape
    if not normed and heads == run.HV:
        return parts
    out = torch.empty_like(given)
    block = max(1, 2048 // run.KP)
    start(
        *(gradients.finish_kernel, -(-tokens * heads // block)),
        *(given, parts, out, tokens * heads),
        GROUP=run.HV // heads,
        K=K,
        KP=run.KP,
        ROWS=block,
        NORM=normed,
        num_warps=4,
    )
    return out


def workspace_bytes(inputs: Inputs, cu_seqlens: Tensor | None, B: int, T: int) -> tuple[int, int]:
    """Return the bytes that a forward and that a backward allocate beside their results and the chunks' offsets.

    Only shapes and dtypes of the inputs matter, so they may lie on the meta device. README.md has the figures a token.
    """
    x, flags = inputs, inputs.flags
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    t = tiles(x, T, N, cu_seqlens is not None)
    chunks = B * -(-T // t.chunk) if cu_seqlens is None else -(-T // t.chunk) + N
    (tokens, HV, V), K = x.value.shape, x.q.shape[2]
    KP, C, word = padded(K), t.chunk, 4 if flags["WIDE"] else 2
    erases, blocks = flags["ERASE"] != NOTHING, KP // t.key_block
    forward = C * KP * (3 if erases else 2) * word + C * C * (2 if erases else 1) * word + 4 * KP
    chunk = forward + 2 * (K + C) * V * word + 4 * C
    if x.raw:
        chunk += 8 * C + 4 * blocks + 4 * KP
    token = 0
    if x.beta is not None:
        token += 4 * (blocks + 1 if flags["ERASE"] == WEIGHED else 1)
    if flags["SCALAR"]:
        token += 4 * blocks
    for given, normed in ((x.q, x.raw), (x.k, x.raw), (x.erase, False)):
        if given is not None and (normed or given.shape[1] != HV):
            token += 4 * K
    return chunks * HV * forward, chunks * HV * chunk + tokens * HV * token
