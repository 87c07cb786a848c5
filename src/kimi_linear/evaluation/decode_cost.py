"""What one more token costs at a given context length: bytes of cache, and time, on a cache filled to that length.

The cache is filled with random numbers instead of by reading a text of that length: what a step costs depends on how
much is remembered, not on what.
"""

import statistics
import time
from dataclasses import dataclass

import torch

from kimi_linear.models.kimi_linear.model import KimiLinearLM
from kimi_linear.nn.state import Cache, TokenState


@dataclass(frozen=True)
class DecodeCost:
    """One reading of one sequence: `context` tokens remembered, `cache_bytes` they take, median `seconds` a token."""

    context: int
    cache_bytes: int
    seconds: float


# Tokens of random numbers that are repeated over a context: drawing a million of them would take a minute.
_RANDOM_TOKENS = 4096


def filled_cache(model: KimiLinearLM, context: int, *, room: int = 64, seed: int = 0) -> Cache:
    """Return a cache of one sequence as long as `context` tokens would leave it, with random contents.

    Args:
        model: The model the cache is for.
        context: Tokens remembered.
        room: Tokens the buffers hold beyond that before they must grow.
        seed: Of the random contents.
    """
    cache = model.new_cache(1)
    generator = torch.Generator().manual_seed(seed)
    for layer in cache.layers:
        if isinstance(layer, TokenState):
            layer.reserve(context + room)
            layer.lengths = torch.full_like(layer.lengths, context)
        for tensor in layer.tensors().values():
            if tensor.is_floating_point():
                _fill(tensor, generator)
    cache.lengths = torch.full_like(cache.lengths, context)
    return cache


def _fill(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Overwrite a tensor [1, tokens, ...] with random numbers that repeat after many tokens."""
    pattern = tensor[:, :_RANDOM_TOKENS].normal_(generator=generator)
    for start in range(_RANDOM_TOKENS, tensor.shape[1], _RANDOM_TOKENS):
        piece = tensor[:, start : start + _RANDOM_TOKENS]
        piece.copy_(pattern[:, : piece.shape[1]])


@torch.inference_mode()
def measure_decode(model: KimiLinearLM, contexts: list[int], *, steps: int = 16) -> list[DecodeCost]:
    """Time single-token steps of one sequence at each context length.

    Args:
        model: In eval mode.
        contexts: Numbers of tokens remembered.
        steps: Steps timed a context, after two that are not; the median is kept.

    Returns:
        One reading a context, in order.

    Example:
        >>> from kimi_linear.models.kimi_linear.presets import preset
        >>> model = KimiLinearLM(preset("tiny")).eval()
        >>> [reading.context for reading in measure_decode(model, [16, 32], steps=2)]
        [16, 32]
    """
    token = torch.zeros(1, 1, dtype=torch.int64)
    readings = []
    for context in contexts:
        cache = filled_cache(model, context, room=steps + 2)
        size = cache.nbytes
        seconds = []
        for _ in range(steps + 2):
            start = time.perf_counter()
            model(token, cache=cache)
            seconds.append(time.perf_counter() - start)
        readings.append(DecodeCost(context, size, statistics.median(seconds[2:])))
    return readings
