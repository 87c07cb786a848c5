"""Two engines, or two checkpoints, on the same tokens: where they first differ, and by how much in the end.

What is compared is an `Engine`: anything that returns the residual stream after each part of each layer and the scores
of the next tokens. One that returns no stream is compared by its scores alone.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kimi_linear.base import env
from kimi_linear.base.errors import ConfigError
from kimi_linear.base.numerics import relative_error
from kimi_linear.causal_lm import KimiLinearForCausalLM
from kimi_linear.checkpoint.assemble import assemble, mapped_tensors
from kimi_linear.checkpoint.configs import read_model_json
from kimi_linear.checkpoint.layout import check_fits
from kimi_linear.checkpoint.reader import stored_tensors
from kimi_linear.models.kimi_linear.config import KimiLinearConfig

# Layer and part; the stream before the first layer is (-1, "embedding").
Place = tuple[int, str]
# Numbers compared together; bounds what is copied at a time.
_PIECE = 1 << 22


@dataclass(frozen=True)
class Trace:
    """What an engine computed of a sequence.

    Fields: `scores`, of the next token behind each of the last positions, [n, V]: logits, or log-probabilities where
    `normalised`; `stream`, the residual stream [T, D] behind each part of each layer, empty if the engine hides it.
    """

    scores: Tensor
    normalised: bool = False
    stream: Mapping[Place, Tensor] = field(default_factory=dict)


class Engine(Protocol):
    """What can be compared.

    Fields: `name`, to call it; `vocab_size`, None if it does not say; `kinds`, the mixer of each layer, empty if it
    does not say; `directory`, of its checkpoint, None if it has none of ours.
    """

    name: str
    vocab_size: int | None
    kinds: tuple[str, ...]
    directory: Path | None

    def greedy(self, ids: Sequence[int], steps: int) -> list[int]:
        """Return the tokens that it generates behind a prompt, always the likeliest."""

    def trace(self, ids: Sequence[int], last: int) -> Trace:
        """Run over a sequence and return the scores behind its last positions, and the stream."""


@contextmanager
def watching(layers: Sequence[Any], norm: nn.Module) -> Iterator[dict[Place, Tensor]]:
    """Collect the residual stream of a network whose layers read it through `input_layernorm` and
    `post_attention_layernorm`, and whose end reads it through `norm`.
    """
    found: dict[Place, Tensor] = {}

    def keep(place: Place) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            found[place] = inputs[0].detach()[0].to("cpu", copy=True)

        return hook

    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            before = (index - 1, "ffn") if index else (-1, "embedding")
            stack.callback(layer.input_layernorm.register_forward_pre_hook(keep(before)).remove)
            after = layer.post_attention_layernorm.register_forward_pre_hook(keep((index, "attention")))
            stack.callback(after.remove)
        stack.callback(norm.register_forward_pre_hook(keep((len(layers) - 1, "ffn"))).remove)
        yield found


class OurEngine:
    """A checkpoint run by this package.

    Args:
        path: A checkpoint.
        dtype: Of the computation.
        backend: The operators to use, "reference" for instance; default: the best for each call.

    Example:
        >>> import tempfile
        >>> from kimi_linear import preset
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     KimiLinearForCausalLM(preset("tiny")).save_pretrained(directory)
        ...     engines = OurEngine(directory), OurEngine(directory, "float64", "reference")
        ...     compare(*engines, [1, 2, 3], steps=2).divergence is None
        True
    """

    def __init__(self, path: str | os.PathLike[str], dtype: str = "float32", backend: str | None = None) -> None:
        self._model = KimiLinearForCausalLM.from_pretrained(path, dtype=dtype)
        self._backend = backend
        self.name = f"{backend or 'ours'}:{path}"
        self.vocab_size: int | None = self._model.config.vocab_size
        self.kinds = tuple(block.mixer.kind for block in self._model.config.layer_blocks)
        self.directory: Path | None = Path(path) if Path(path).is_dir() else None

    @torch.no_grad()
    def greedy(self, ids: Sequence[int], steps: int) -> list[int]:
        """Return the likeliest tokens behind a prompt; end tokens do not end it."""
        with self._on_backend():
            whole = self._model.generate([list(ids)], max_new_tokens=steps, temperature=0.0, stop_token_ids=())
        return [int(token) for token in whole[0, len(ids) :]]

    @torch.no_grad()
    def trace(self, ids: Sequence[int], last: int) -> Trace:
        """Run over a sequence."""
        decoder = self._model.model
        with self._on_backend(), watching(decoder.blocks(), decoder.norm) as stream:
            logits = self._model(torch.tensor([list(ids)])).logits
        return Trace(logits[0, -last:], stream=stream)

    def _on_backend(self) -> AbstractContextManager[None]:
        return nullcontext() if self._backend is None else env.changed("KIMI_LINEAR_BACKEND", self._backend)


@dataclass(frozen=True)
class PartDifference:
    """How far the streams are apart behind one part of one layer, relative to their size."""

    layer: int
    kind: str
    part: str
    error: float


@dataclass(frozen=True)
class WeightDifferences:
    """Two checkpoints' tensors: how many there are, how many differ, and the first ten by relative difference."""

    tensors: int
    different: int
    largest: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Comparison:
    """What a comparison found; `a` is the first engine and what relative differences are relative to.

    Fields: `parts`, in the order of computation; `divergence`, the first of them beyond the tolerance; `max_logit` and
    `relative_logit`, differences of the scores behind the prompt and each step; `kl`, their mean divergence KL(a || b)
    in nats; `steps` and `agreeing`, the tokens that a generates greedily and those that b would too behind the same
    tokens; `first_step`, the first (from 0) that it would not; `weights`, if both are checkpoints of one configuration.
    """

    a: str
    b: str
    prompt: tuple[int, ...]
    tolerance: float
    parts: tuple[PartDifference, ...]
    divergence: PartDifference | None
    max_logit: float
    relative_logit: float
    kl: float
    scores: str
    generated: tuple[int, ...]
    agreeing: int
    first_step: int | None
    weights: WeightDifferences | None
    notes: tuple[str, ...]

    @property
    def steps(self) -> int:
        """How many tokens were generated."""
        return len(self.generated)


def compare(
    a: Engine, b: Engine, ids: Sequence[int], *, steps: int = 16, tolerance: float = 1e-4, weights: bool = True
) -> Comparison:
    """Run two engines over the same tokens.

    The first one generates `steps` tokens behind the prompt; then both run over prompt and tokens, so that every step
    is compared behind the same text, whether they would have parted before or not.

    Args:
        a: The engine that generates, and that differences are relative to.
        b: The other one.
        ids: The prompt.
        steps: Tokens to generate.
        tolerance: Relative difference of the stream beyond which it counts as another.
        weights: Whether to compare the tensors too, where both have a checkpoint.

    Raises:
        ConfigError: No prompt, a token beyond the vocabulary, or vocabularies of different sizes.
    """
    prompt = _check_prompt(a, b, ids, steps)
    generated = a.greedy(prompt, steps) if steps else []
    sequence = [*prompt, *generated]
    ours, theirs = (engine.trace(sequence, len(generated) + 1) for engine in (a, b))
    parts, notes = _parts(a, b, ours.stream, theirs.stream)
    x, y, scores = _scores(ours, theirs)
    agrees = [int(row.argmax()) == token for row, token in zip(y, generated, strict=False)]
    known = x.isfinite() & y.isfinite()
    difference = torch.where(known, x - y, 0.0)
    log_p, log_q = x.log_softmax(-1), y.log_softmax(-1)
    kl = torch.where(known, log_p.exp() * (log_p - log_q), 0.0).sum(-1).mean()
    differing, note = _weights(a, b) if weights else (None, "")
    return Comparison(
        *(a.name, b.name, tuple(prompt), tolerance, parts),
        divergence=next((part for part in parts if not part.error <= tolerance), None),
        max_logit=float(difference.abs().max()),
        relative_logit=relative_error(torch.where(known, y, 0.0), torch.where(known, x, 0.0)),
        kl=max(0.0, float(kl)),
        scores=scores,
        generated=tuple(generated),
        agreeing=sum(agrees),
        first_step=None if all(agrees) else agrees.index(False),
        weights=differing,
        notes=tuple(filter(None, [*notes, note])),
    )


def _check_prompt(a: Engine, b: Engine, ids: Sequence[int], steps: int) -> list[int]:
    if type(steps) is not int or steps < 0:
        raise ConfigError(f"steps is {steps!r}, expected 0 or more tokens to generate.")
    if not ids:
        raise ConfigError("the prompt holds no token; give at least one.")
    if a.vocab_size and b.vocab_size and a.vocab_size != b.vocab_size:
        raise ConfigError(
            f"{a.name} has {a.vocab_size} tokens and {b.name} has {b.vocab_size}; compare models of one vocabulary."
        )
    limit = a.vocab_size or b.vocab_size
    wrong = [token for token in ids if type(token) is not int or token < 0 or (limit is not None and token >= limit)]
    if wrong:
        raise ConfigError(f"the prompt holds {wrong[0]!r}, expected token ids from 0 to {(limit or 0) - 1}.")
    return list(ids)


def _parts(
    a: Engine, b: Engine, x: Mapping[Place, Tensor], y: Mapping[Place, Tensor]
) -> tuple[tuple[PartDifference, ...], list[str]]:
    if not x or not y:
        return (), [f"{(b if x else a).name} does not show its layers: only scores are compared."]
    kinds = a.kinds or b.kinds
    places = [(-1, "embedding"), *((i, part) for i in range(len(kinds)) for part in ("attention", "ffn"))]
    both = [place for place in places if place in x and place in y and x[place].shape == y[place].shape]
    notes = [] if x.keys() == y.keys() and len(both) == len(x) else ["the networks have other layers or widths."]
    if a.kinds and b.kinds and a.kinds != b.kinds:
        notes.append("the networks have other mixers.")
    return (
        tuple(
            PartDifference(i, kinds[i] if i >= 0 else "", part, relative_error(y[i, part], x[i, part]))
            for i, part in both
        ),
        notes,
    )


def _scores(a: Trace, b: Trace) -> tuple[Tensor, Tensor, str]:
    x, y = a.scores.double().cpu(), b.scores.double().cpu()
    width = min(x.shape[-1], y.shape[-1])
    x, y = x[:, :width], y[:, :width]
    if not (a.normalised or b.normalised):
        return x, y, "logits"
    return x.log_softmax(-1), y.log_softmax(-1), "log-probabilities"


def _weights(a: Engine, b: Engine) -> tuple[WeightDifferences | None, str]:
    if a.directory is None or b.directory is None or a.directory.resolve() == b.directory.resolve():
        return None, ""
    (config, x), (other, y) = (release_tensors_in(engine.directory) for engine in (a, b) if engine.directory)
    if config.shapes() != other.shapes():
        return None, "the weights are not compared: their shapes differ."
    errors = {name: weight_error(y[name], x[name]) for name in x}
    ordered = sorted(((name, error) for name, error in errors.items() if error > 0), key=lambda item: -item[1])
    return WeightDifferences(len(errors), len(ordered), tuple(ordered[:10])), ""


def release_tensors_in(directory: Path) -> tuple[KimiLinearConfig, dict[str, Tensor]]:
    """Return a checkpoint's configuration and its tensors under the release's names, as views of the files.

    Raises:
        CheckpointError: It is damaged or incomplete.
    """
    config, stored = read_model_json(directory), stored_tensors(directory)
    moves = check_fits(stored, config, directory)
    return config, assemble(mapped_tensors({name: tensor.file for name, tensor in stored.items()}), moves, config)


def weight_error(x: Tensor, reference: Tensor) -> float:
    """Return the relative difference of two tensors, a piece at a time; inf where either is not finite."""
    difference, size = 0.0, 0.0
    for one, other in zip(x.reshape(-1).split(_PIECE), reference.reshape(-1).split(_PIECE), strict=True):
        if one.dtype == other.dtype and torch.equal(one, other):
            size += float(other.double().square().sum())
            continue
        difference += float((one.double() - other.double()).square().sum())
        size += float(other.double().square().sum())
    if difference == 0.0:
        return 0.0
    error = (difference / size) ** 0.5 if size else float("inf")
    return error if error == error else float("inf")


def report(found: Comparison) -> list[str]:
    """Return a comparison as lines for a terminal."""
    lines = [f"a           {found.a}", f"b           {found.b}"]
    by_layer: dict[tuple[int, str], list[str]] = {}
    for part in found.parts:
        by_layer.setdefault((part.layer, part.kind), []).append(f"{part.part} {part.error:.1e}")
    for (layer, kind), errors in by_layer.items():
        lines.append(f"{'input' if layer < 0 else f'layer {layer}':12}{kind:5}{'  '.join(errors)}")
    lines += _verdict(found)
    lines += [
        f"scores      {found.scores}: largest difference {found.max_logit:.2e}, relative {found.relative_logit:.2e}, "
        f"KL divergence {found.kl:.2e} nats",
        f"tokens      {found.agreeing} of {found.steps} greedy tokens agree"
        + ("" if found.first_step is None else f"; the first that does not is number {found.first_step + 1}"),
    ]
    if found.weights is not None:
        lines.append(f"weights     {found.weights.different} of {found.weights.tensors} tensors differ")
        lines += [f"            {error:.1e}  {name}" for name, error in found.weights.largest]
    return [*lines, *(f"note        {note}" for note in found.notes)]


def _verdict(found: Comparison) -> list[str]:
    if not found.parts:
        return []
    first = found.divergence
    if first is None:
        return [f"divergence  none beyond {found.tolerance:.0e}"]
    where = f"layer {first.layer} ({first.kind}), its {first.part}" if first.layer >= 0 else "the embedding"
    return [f"divergence  first beyond {found.tolerance:.0e} behind {where}: {first.error:.1e}"]
