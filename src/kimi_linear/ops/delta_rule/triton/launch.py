"""From tensors to launches, forward and backward."""

import math
from typing import Any

import torch
from torch import Tensor

from kimi_linear.ops.delta_rule.triton import gradients, prepare, segments, serial
from kimi_linear.ops.delta_rule.triton.chunks import Segments, cut
from kimi_linear.ops.delta_rule.triton.inputs import WEIGHED, Inputs
from kimi_linear.ops.delta_rule.triton.plan import Rooms, plan, total_bytes, views
from kimi_linear.ops.triton.launch import padded, start


class Run:
    """One call: its plan, its chunks and, by name, the rooms of its workspace."""

    def __init__(self, inputs: Inputs, cu_seqlens: Tensor | None, B: int, T: int) -> None:
        self.inputs, self.plan = inputs, plan(inputs, cu_seqlens, B, T)
        self.tiles, self.rows = self.plan.tiles, self.plan.rows
        self.chunks = cut(cu_seqlens, B, T, self.tiles.chunk, inputs.q.device)
        self.N, self.K, self.V, self.KP = self.plan.sequences, self.plan.K, self.plan.V, self.plan.KP
        self.H, self.HV, self.HE = inputs.heads
        self.rooms: dict[str, Tensor] = {}

    def room(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return uninitialised memory."""
        return torch.empty(shape, dtype=dtype or self.plan.dtype, device=self.inputs.q.device)

    def allocate(self, rooms: Rooms) -> Tensor:
        """Add rooms to the workspace, in one allocation, and return it."""
        memory = self.room(total_bytes(rooms), dtype=torch.uint8)
        self.rooms |= views(memory, rooms)
        return memory

    def factors(self, *names: str) -> tuple[Tensor | None, ...]:
        """Return rooms, None for one that this call does not have."""
        return tuple(self.rooms.get(name) for name in names)

    def prepare(self) -> None:
        """Fill the factors, scores and inverses."""
        x, c, t = self.inputs, self.chunks, self.tiles
        start(
            *(prepare.prepare_kernel, c.count * self.HV),
            *(x.q, x.k, x.erase, x.g, x.beta, x.A_log, x.dt_bias),
            *(c.cu_seqlens, c.first, c.owner),
            *self.factors("q", "erase", "k", "total", "scores", "inverse"),
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

    def chain(self, o: Tensor | None, final: Tensor | None, keep: bool) -> None:
        """Run the chunks one after the other: write o and the final states, and with `keep` what the backward needs."""
        x, c = self.inputs, self.chunks
        if not self.plan.segment:
            return self._launch_chain(x.initial, o, final, c.cu_seqlens, c.first, self.N, keep=keep)
        cuts = self.segments()
        span = (cuts.cu_seqlens, cuts.chunk, cuts.count)
        self._launch_chain(None, None, self.rooms["offset"], *span)
        self.measure_gains()
        self.fold(x.initial, final, reverse=False)
        return self._launch_chain(self.rooms["entering"], o, None, *span, keep=keep)

    def reverse(self, d_o: Tensor, d_final: Tensor, d_initial: Tensor, d_z: Tensor, d_states: Tensor) -> None:
        """Run the chunks from the last to the first: write dz, the gradients of the states, and the initial ones'."""
        c = self.chunks
        if not self.plan.segment:
            return self._launch_reverse(d_o, d_final, d_initial, c.cu_seqlens, c.first, self.N, d_z, d_states)
        cuts = self.segments()
        span = (cuts.cu_seqlens, cuts.chunk, cuts.count)
        self._launch_reverse(d_o, None, self.rooms["offset"], *span)
        self.fold(d_final, d_initial, reverse=True)
        return self._launch_reverse(d_o, self.rooms["entering"], None, *span, d_z, d_states)

    def segments(self) -> Segments:
        """Return the segments; the rooms of their maps are there from the first call on."""
        if "gain" not in self.rooms:
            self.allocate(self.plan.maps)
        return self.chunks.segments(self.plan.segment, self.plan.segments)

    def measure_gains(self) -> None:
        """Write what every segment multiplies its state by."""
        cuts = self.segments()
        self._launch_chain(None, None, self.rooms["gain"], cuts.cu_seqlens, cuts.chunk, cuts.count, gain=True)

    def fold(self, initial: Tensor | None, final: Tensor | None, reverse: bool) -> None:
        """Join the segments' maps: write the states entering them, and the final ones; or gradients, backwards."""
        block = min(padded(self.V), 32)
        start(
            *(segments.fold_kernel, self.N * self.HV * -(-self.V // block)),
            *(self.rooms["gain"], self.rooms["offset"], initial, self.rooms["entering"], final),
            *(self.segments().first, self.HV),
            K=self.K,
            V=self.V,
            KP=self.KP,
            BK=min(self.KP, 32),
            BV=block,
            HAS_INITIAL=initial is not None,
            FINAL=final is not None,
            REVERSE=reverse,
            num_warps=4 if self.KP <= 128 else 8,
            num_stages=2,
        )

    def _launch_chain(
        self,
        initial: Tensor | None,
        o: Tensor | None,
        final: Tensor | None,
        cu_seqlens: Tensor,
        first: Tensor,
        runs: int,
        keep: bool = False,
        gain: bool = False,
    ) -> None:
        x, t, flags, V = self.inputs, self.tiles, self.inputs.flags, self.K if gain else self.V
        block = min(padded(V), t.chain_block)
        kept = self.factors("states", "written") if keep else (None, None)
        start(
            *(serial.forward_kernel, runs * self.HV * -(-V // block)),
            *(x.value, x.beta, *self.factors("q", "erase", "k", "total", "scores", "inverse")),
            *(initial, o, final, *kept, cu_seqlens, first, x.beta_scale, self.HV),
            **self.chain_sizes(V, block),
            BETA=0 if gain else flags["BETA"],
            HAS_INITIAL=initial is not None,
            GAIN=gain,
            OUTPUT=o is not None,
            FINAL=final is not None,
            KEEP=keep,
            num_warps=t.chain_warps,
            num_stages=2,
        )

    def _launch_reverse(
        self,
        d_o: Tensor,
        d_final: Tensor | None,
        d_initial: Tensor | None,
        cu_seqlens: Tensor,
        first: Tensor,
        runs: int,
        d_z: Tensor | None = None,
        d_states: Tensor | None = None,
    ) -> None:
        t = self.tiles
        start(
            *(serial.reverse_kernel, runs * self.HV * -(-self.V // t.chain_block)),
            *(d_o, d_final, *self.factors("q", "erase", "k", "total", "scores", "inverse")),
            *(d_z, d_states, d_initial, cu_seqlens, first, self.HV),
            **self.chain_sizes(self.V, t.chain_block),
            HAS_FINAL=d_final is not None,
            INITIAL=d_initial is not None,
            KEEP=d_z is not None,
            num_warps=t.chain_warps,
            num_stages=2,
        )

    def chain_sizes(self, V: int, block: int) -> dict[str, Any]:
        """Return what the serial kernels are compiled for, by channels of a value and of a program."""
        flags = self.inputs.flags
        sizes = {"K": self.K, "V": V, "KP": self.KP, "BV": block, "C": self.tiles.chunk}
        return {**sizes, "ERASE": flags["ERASE"], "WIDE": flags["WIDE"]}


def forward(
    inputs: Inputs, cu_seqlens: Tensor | None, B: int, T: int, keep: str = "inputs"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return o [tokens, HV, V], the final states [N, HV, K, V] and what is kept for the backward, uint8 [bytes].

    Two launches, five with segments.
    """
    run = Run(inputs, cu_seqlens, B, T)
    o = torch.empty_like(inputs.value)
    final = run.room(run.N, run.HV, run.K, run.V, dtype=torch.float32)
    kept = run.allocate(run.plan.kept(keep) or run.plan.factors)
    run.prepare()
    run.chain(o, final, keep=keep == "states")
    return o, final, kept.new_empty(0) if keep == "inputs" else kept


def backward(
    inputs: Inputs,
    cu_seqlens: Tensor | None,
    B: int,
    T: int,
    d_o: Tensor,
    d_final: Tensor,
    kept: Tensor | None = None,
    keep: str = "inputs",
) -> dict[str, Tensor | None]:
    """Return the gradients by the names of `Inputs`.

    Five launches, one more for q, k, and sums in a fixed order; less the first, or the first two, with what was kept.
    """
    run = Run(inputs, cu_seqlens, B, T)
    x, t, rows = inputs, run.tiles, run.rows
    _restore(run, kept, keep)
    d_states, d_z = run.room(rows, run.K, run.V), run.room(rows, t.chunk, run.V)
    d_initial = run.room(run.N, run.HV, run.K, run.V, dtype=torch.float32)
    run.reverse(d_o, d_final, d_initial, d_z, d_states)
    found = {
        name: None if given is None else torch.empty_like(given) for name, given in (("value", x.value), ("g", x.g))
    }
    parts = Parts(run)
    squares = run.factors("scores", "inverse")
    if keep != "inputs":
        # What was kept may be used again.
        squares = tuple(None if square is None else run.room(*square.shape) for square in squares)
    gradients_of = (*squares, parts.diagonal, parts.norms)
    written, states = run.rooms["written"], run.rooms["states"]
    _launch_scores(run, written, d_o, d_z, found["value"], gradients_of, parts)
    _launch_collect(run, (written, states, d_o, d_z, d_states), gradients_of, found["g"], parts)
    return {**found, "initial": d_initial, **parts.finish(found["g"])}


def _restore(run: Run, kept: Tensor | None, keep: str) -> None:
    """Fill the workspace: from what was kept, and by computing the rest."""
    p = run.plan
    if kept is not None and keep != "inputs":
        run.rooms |= views(kept, p.kept(keep))
    else:
        run.allocate(p.factors)
        run.prepare()
    if keep == "states":
        if p.segment:
            run.measure_gains()
        return
    run.allocate(p.states)
    run.chain(None, None, keep=True)


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
        BV=t.score_block,
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
        # Left alone, the assembler spills a register or two to fit one more program in.
        maxnreg=255,
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
