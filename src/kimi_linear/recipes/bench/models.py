"""The whole model: reading a prompt, generating, training; and one layer over ever longer texts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import torch

from kimi_linear.base.errors import ConfigError
from kimi_linear.inference.native.engine import parts_of_linears
from kimi_linear.inference.native.modules import Stand
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.ops import native
from kimi_linear.ops.linear.packed import WeightFormat
from kimi_linear.recipes.bench.ceilings import Memory
from kimi_linear.recipes.bench.engine import WEIGHT_BYTES, Engine, build, served_dtype
from kimi_linear.recipes.bench.record import Row
from kimi_linear.recipes.bench.timing import Effort, in_turns, spread

OURS = "kimi-linear"
# Memory is read for so long after every turn.
READ_SECONDS = 0.1
# Forward, and twice that for the gradients of inputs and weights.
TRAINING_FACTOR = 3
# The ceiling of products with weights of a kind: integers meet activations rounded to 8 bits.
ARITHMETIC = {"float32": "fma_float32", "bfloat16": "dot_bfloat16", "int8": "dot_int8", "int4": "dot_int8"}


@dataclass(frozen=True)
class Work:
    """One thing a model is timed at.

    Args:
        section: "prefill", "decode" or "training".
        weights: Kind of weights; in training the arithmetic, "bfloat16" for autocast.
        tokens: Of the prompt, or of a training sequence.
        steps: Tokens generated.
        batch: Sequences of a training step.
    """

    section: str
    weights: str
    tokens: int
    steps: int = 0
    batch: int = 1

    @property
    def counted(self) -> int:
        """Tokens a reading is divided into."""
        return self.steps or self.batch * self.tokens

    def case(self) -> dict[str, object]:
        """Plain values for the record."""
        if self.section == "training":
            return {"arithmetic": self.weights, "batch": self.batch, "tokens": self.tokens}
        kept = {"weights": self.weights, "tokens": self.tokens}
        return {**kept, "steps": self.steps} if self.steps else kept


def works(quick: bool) -> list[Work]:
    """Return what a run times."""
    if quick:
        return [
            *(Work("prefill", weights, 512) for weights in ("bfloat16", "float32")),
            *(Work("decode", weights, 16, steps=8) for weights in ("bfloat16", "int8", "int4")),
            Work("training", "bfloat16", 256),
        ]
    return [
        Work("prefill", "bfloat16", 512),
        *(Work("prefill", weights, 4096) for weights in ("float32", "bfloat16", "int8", "int4")),
        *(Work("decode", weights, 32, steps=64) for weights in ("float32", "bfloat16", "int8", "int4")),
        *(Work("training", arithmetic, 1024, batch=4) for arithmetic in ("bfloat16", "float32")),
        Work("training", "bfloat16", 1024, batch=1),
    ]


def rate_row(
    work: Work,
    engine: str,
    config: KimiLinearConfig,
    seconds: list[float],
    reason: str = "",
    version: str = "",
    read_rates: Sequence[float] = (),
) -> Row:
    """Return the row of an engine on a piece of work, from the seconds of its turns and memory's rates beside them."""
    row = Row(work.section, engine, work.case(), "tokens/s", [work.counted / s for s in seconds])
    row.reason, row.version = reason, version
    if not seconds:
        return row
    row.achieved, row.ceiling = demand(work, config, spread(row.values).median)
    if row.ceiling == "read_gigabytes" and read_rates:
        row.ceiling_rate = spread(read_rates).median
    return row


def demand(work: Work, config: KimiLinearConfig, tokens_per_second: float) -> tuple[float, str]:
    """Return what a rate needs of the machine, and the ceiling that is: GFLOP/s, or GB/s of weights and states."""
    if work.section == "decode":
        remembered = 2 * config.state_bytes(0, 2) + config.state_bytes(work.tokens, 2) - config.state_bytes(0, 2)
        read = config.active_parameters() * WEIGHT_BYTES[work.weights] + remembered
        return 1e-9 * read * tokens_per_second, "read_gigabytes"
    flop = config.flops_per_token(work.tokens // 2)
    if work.section == "training":
        return 1e-9 * TRAINING_FACTOR * flop * tokens_per_second, ARITHMETIC[work.weights]
    # Of a prompt only the last token goes through the output head.
    flop -= 2 * config.vocab_size * config.hidden_size
    return 1e-9 * flop * tokens_per_second, ARITHMETIC[work.weights]


def bound_work(engine: Engine, work: Work) -> Callable[[], float]:
    """Return a function that does a piece of work once and returns its seconds."""
    if work.section == "prefill":
        return lambda: engine.prefill(work.tokens)
    if work.section == "decode":
        return lambda: engine.decode(work.tokens, work.steps)
    return lambda: engine.train(work.batch, work.tokens, "bf16" if work.weights == "bfloat16" else "fp32")


def own_seconds(call: Callable[[], float], effort: Effort, memory: Memory) -> tuple[list[float], list[float]]:
    """Return the seconds that a piece of work reports of itself, turn by turn, and memory's rate after each."""
    call()
    seconds, rates = list[float](), list[float]()
    while len(seconds) < effort.rounds and sum(seconds) < effort.budget_seconds:
        seconds.append(call())
        rates.append(memory.read(READ_SECONDS))
    return seconds, rates


def measure(config: KimiLinearConfig, quick: bool, effort: Effort) -> Iterator[Row]:
    """Yield the row of every piece of work, one kind of weights at a time."""
    engine, held, memory = None, "", Memory()
    for work in works(quick):
        kind = "" if work.section == "training" else work.weights
        if engine is None or kind != held:
            # The old weights go before the new ones come.
            engine = None
            try:
                engine, held = Engine(build(config), kind or None), kind
            except ConfigError as error:
                yield rate_row(work, OURS, config, [], reason=str(error))
                continue
        seconds, rates = own_seconds(bound_work(engine, work), effort, memory)
        yield rate_row(work, OURS, config, seconds, read_rates=rates)


def layer_lengths(quick: bool) -> list[int]:
    """Return the lengths at which one layer is measured."""
    return [1024, 4096] if quick else [1024, 4096, 16384, 65536, 262144]


@torch.inference_mode()
def measure_layer(
    config: KimiLinearConfig, weights: str, lengths: list[int], effort: Effort, piece: int = 4096
) -> Iterator[Row]:
    """Yield what a token costs in one Kimi Delta Attention layer, over texts of each length read in pieces.

    Args:
        config: Of the network whose second layer is measured.
        weights: Kind of weights.
        lengths: Tokens of a text.
        effort: Turns; one is one text.
        piece: Tokens a call, as a prompt is read when memory is to stay bounded.
    """
    dtype = served_dtype(weights)
    layer = build(config).to(dtype).eval().model.blocks()[1].self_attn
    x = torch.randn(1, piece, config.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    # As in a model prepared for inference, where that can be.
    packed = Stand(parts_of_linears(layer, cast(WeightFormat, weights))) if native.why_unavailable() is None else None

    def read(T: int) -> None:
        state = layer.new_state(1, device=x.device, dtype=dtype)
        with packed.inside() if packed else nullcontext():
            for start in range(0, T, piece):
                layer(x[:, : min(piece, T - start)], state)

    flop = config.layer_blocks[1].mixer.flops_per_token(config.hidden_size, 0)
    calls = {str(T): lambda T=T: read(T) for T in lengths}
    for name, seconds in in_turns(calls, effort).items():
        T = int(name)
        row = Row("layer", OURS, {"weights": weights, "tokens": T, "piece": min(piece, T)}, "us per token")
        row.values = [1e6 * s / T for s in seconds]
        row.achieved = 1e-9 * flop * T / spread(seconds).median
        row.ceiling = ARITHMETIC[weights]
        yield row
