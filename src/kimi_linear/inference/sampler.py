"""From logits to one token a row. Vectorised over the batch; a row never depends on its neighbours.

Order: repetition penalty, temperature, top-k, top-p, min-p, softmax, draw. Letters: B rows, V vocabulary, L tokens so
far. Everything is float64, so that a filter cuts at the same token whatever dtype the logits came in.
"""

import math

import torch
from torch import Tensor

from kimi_linear.base.errors import ConfigError, KimiLinearError, ShapeError
from kimi_linear.inference.params import SamplingParams
from kimi_linear.ops import native
from kimi_linear.ops.native.library import DTYPES

__all__ = ["RowGenerator", "SamplingParams", "sample"]

_MASK = (1 << 64) - 1


class RowGenerator:
    """Uniform numbers for the rows of a batch, each a function of (seed, row, step) only.

    A row keeps its numbers when other rows leave the batch, and draws the same ones on every device. The numbers are
    SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) applied to the three values in turn.

    Example:
        >>> RowGenerator(seed=7, num_rows=2).next() == RowGenerator(seed=7, num_rows=2).next()
        True
    """

    def __init__(self, seed: int | None, num_rows: int) -> None:
        # Without a seed torch.manual_seed governs, as for every other random call in torch.
        self.seed = int(torch.randint(2**62, ())) if seed is None else seed
        self.rows = list(range(num_rows))
        self.step = 0

    def next(self) -> list[float]:
        """Return one number in [0, 1) for each row, and move on to the next step."""
        numbers = [_uniform(self.seed, row, self.step) for row in self.rows]
        self.step += 1
        return numbers

    def keep(self, indices: list[int]) -> None:
        """Drop every row of the batch whose position is not in `indices`; the others keep their own numbers."""
        self.rows = [self.rows[index] for index in indices]


def _uniform(seed: int, row: int, step: int) -> float:
    bits = _mix(_mix(_mix(seed) ^ row) ^ step)
    # 48 bits: total * u stays strictly below the total in float64, so a draw can never fall behind the last token.
    return (bits >> 16) * 2.0**-48


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def sample(
    logits: Tensor, history: Tensor | None, params: SamplingParams, generator: RowGenerator | None = None
) -> Tensor:
    """Pick the next token of every row.

        p = softmax(filter(penalise(logits) / temperature)),  token = min {i : sum_{j<=i} p_j > u}
        repetition penalty as in CTRL, arXiv:1909.05858 section 4.1, with negative logits multiplied;
        top-p: arXiv:1904.09751; min-p: arXiv:2407.01082.

    Args:
        logits: [B, V], any floating dtype, every entry finite.
        history: Tokens the penalty looks at, [B, L] int64, -1 where a row has none. None where the penalty is 1.
        params: What to do; its stop settings are not read here.
        generator: Where the draws come from, one row each; advances by one step. None only at temperature 0.

    Returns:
        Token ids, [B] int64, on the device of the logits.

    Raises:
        ShapeError: The logits are not [B, V], or the generator or the history has another number of rows.
        ConfigError: A draw is asked for without a generator, or a penalty without a history.
        KimiLinearError: A row holds NaN or an infinity; names the rows.

    Numerics: float64 throughout. At equal logits the lower id wins, in greedy picks and at the edge of a filter.
        At least the most likely token passes every filter.
    Cost: O(B V); top-p without top-k adds a partial sort, as wide as the kept tokens need.

    Example:
        >>> sample(torch.tensor([[0.0, 2.0, 1.0]]), None, SamplingParams(temperature=0.0)).tolist()
        [1]
    """
    greedy = params.temperature == 0 and params.repetition_penalty == 1.0
    if greedy and (tokens := _native_argmax(logits)) is not None:
        return tokens
    _check(logits, history, params, generator)
    scores = logits.double()
    if params.repetition_penalty != 1.0 and history is not None:
        scores = _penalise(scores, history, params.repetition_penalty)
    if params.temperature == 0 or generator is None:
        return scores.argmax(-1)
    # The largest score becomes 0 first, so that a tiny temperature sends the others to -inf and nothing to +inf.
    scores = (scores - scores.amax(-1, keepdim=True)) / params.temperature
    if params.top_k is not None and params.top_k < scores.shape[-1]:
        scores = _top_k(scores, params.top_k)
    if params.top_p < 1:
        scores = _top_p(scores, params.top_p)
    if params.min_p > 0:
        scores = scores.masked_fill(scores < math.log(params.min_p), -math.inf)
    cumulative = scores.softmax(-1).cumsum(-1)
    numbers = torch.tensor(generator.next(), dtype=torch.float64, device=logits.device)
    # The first token whose running sum exceeds u * total has a probability above zero.
    return torch.searchsorted(cumulative, numbers[:, None] * cumulative[:, -1:], right=True)[:, 0]


def _native_argmax(logits: Tensor) -> Tensor | None:
    """Return the greedy picks, or None where the native kernel does not run or the logits are not as they should be."""
    if logits.dim() != 2 or logits.dtype not in DTYPES or logits.device.type != "cpu" or native.why_unavailable():
        return None
    rows = logits.detach().contiguous()
    tokens = torch.empty(rows.shape[0], dtype=torch.int64)
    native.kernel("sample_argmax", "ipiip")(DTYPES[rows.dtype], rows, *rows.shape, tokens)
    return None if min(tokens.tolist(), default=0) < 0 else tokens


def _check(logits: Tensor, history: Tensor | None, params: SamplingParams, generator: RowGenerator | None) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ShapeError(f"sample: logits are {list(logits.shape)}, expected [B, V] with V >= 1.")
    # NaN and infinities survive a sum; only a sum that is not finite is worth a look at every entry.
    if not math.isfinite(float(logits.detach().sum(dtype=torch.float64))) and not bool(logits.isfinite().all()):
        rows = (~logits.isfinite()).any(-1).nonzero()[:, 0].tolist()
        raise KimiLinearError(
            f"sample: the logits of row {', '.join(map(str, rows))} hold NaN or an infinity, expected finite numbers; "
            "the weights or the prompt's activations overflowed, so try float32 weights or check the checkpoint."
        )
    if params.temperature > 0:
        if generator is None:
            raise ConfigError(f"sample: temperature is {params.temperature} and there is no generator; pass one.")
        if len(generator.rows) != logits.shape[0]:
            raise ShapeError(f"sample: the generator has {len(generator.rows)} rows, the logits {logits.shape[0]}.")
    if params.repetition_penalty != 1.0:
        if history is None:
            raise ConfigError(f"sample: repetition_penalty is {params.repetition_penalty}, which needs a history.")
        if history.dim() != 2 or history.shape[0] != logits.shape[0]:
            raise ShapeError(f"sample: history is {list(history.shape)}, expected [{logits.shape[0]}, L] (B, L).")


def _penalise(scores: Tensor, history: Tensor, penalty: float) -> Tensor:
    # One extra column takes the -1 entries.
    seen = scores.new_zeros(scores.shape[0], scores.shape[1] + 1, dtype=torch.bool)
    seen.scatter_(1, history.to(scores.device) % (scores.shape[1] + 1), True)
    return torch.where(seen[:, :-1], torch.where(scores > 0, scores / penalty, scores * penalty), scores)


def _top_k(scores: Tensor, k: int) -> Tensor:
    threshold = scores.topk(k, -1).values[:, -1:]
    return _keep_largest(scores, torch.full_like(threshold, k), threshold)


def _top_p(scores: Tensor, top_p: float) -> Tensor:
    normaliser = scores.logsumexp(-1, keepdim=True)
    width = min(1024, scores.shape[-1])
    while True:
        largest = scores.topk(width, -1).values
        mass = (largest - normaliser).exp().cumsum(-1)
        if width == scores.shape[-1] or bool((mass[:, -1] >= top_p).all()):
            break
        # A flat distribution: a full sort of 160k tokens costs ten times the first look, so widen by steps.
        width = min(8 * width, scores.shape[-1])
    # Tokens strictly before the crossing, and the one that crosses.
    count = ((mass < top_p).sum(-1, keepdim=True) + 1).clamp(max=width)
    return _keep_largest(scores, count, largest.gather(-1, count - 1))


def _keep_largest(scores: Tensor, count: Tensor, threshold: Tensor) -> Tensor:
    """Keep `count` [B, 1] entries a row, the smallest of them equal to `threshold` [B, 1]; lower ids win ties."""
    above, equal = scores > threshold, scores == threshold
    room = count - above.sum(-1, keepdim=True)
    return scores.masked_fill(~(above | (equal & (equal.cumsum(-1) <= room))), -math.inf)
