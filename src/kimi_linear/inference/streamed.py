"""A model whose weights stay in their files: each layer is mapped, run and unmapped, and of experts only the chosen.

Results are those of the loaded model, but for the routed experts' sum: each expert's part is rounded to the dtype of
the activations before it is added, in float32, in the order of the experts. The head is computed in blocks of rows.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from tqdm import tqdm

from kimi_linear.base.errors import ConfigError
from kimi_linear.checkpoint.configs import read_model_json
from kimi_linear.checkpoint.load import torch_dtype
from kimi_linear.checkpoint.mapped import MappedCheckpoint
from kimi_linear.inference import resident
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.models.kimi_linear.keys import key_maps
from kimi_linear.models.kimi_linear.model import KimiLinearLM
from kimi_linear.nn.ffn.moe import MixtureOfExperts
from kimi_linear.nn.state import Cache
from kimi_linear.ops.checks import compute_dtype
from kimi_linear.ops.moe import grouped_mlp
from kimi_linear.ops.moe.grouped import plan_runs

M = TypeVar("M", bound=KimiLinearLM)

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def open_streamed(
    directory: Path, build: Callable[[KimiLinearConfig], M], dtype: str | torch.dtype | None = None
) -> tuple[M, "StreamedModel"]:
    """Return a model without weights, in evaluation mode, and what runs it from a checkpoint's files.

    Args:
        directory: The checkpoint, in any layout that loads.
        build: The model's class.
        dtype: To compute in; default: as stored. Another one is converted to matrix by matrix, in every call.

    Raises:
        CheckpointError, DtypeError: As when loading.
    """
    target = torch_dtype(dtype)
    config = read_model_json(directory)
    tensors = MappedCheckpoint(directory, config)
    with torch.device("meta"):
        model = build(config)
    model.to(target or tensors.dtype).requires_grad_(False).eval()
    return model, StreamedModel(model, tensors)


class StreamedModel:
    """Runs a model on the meta device with the weights of a mapped checkpoint, layer by layer.

    While a prompt is read, a bar on a terminal shows layers and bytes.

    Args:
        model: Its parameters become placeholders, and its experts run one at a time.
        tensors: The checkpoint.

    Example:
        >>> import tempfile
        >>> from kimi_linear import KimiLinearForCausalLM, load_model, preset
        >>> with tempfile.TemporaryDirectory() as path:
        ...     KimiLinearForCausalLM(preset("tiny")).save_pretrained(path)
        ...     model = load_model(path, stream_weights=True)
        ...     model.generate([[1, 2, 3]], max_new_tokens=5, temperature=0.0).shape
        torch.Size([1, 8])
    """

    # What the weights were packed as: nothing.
    weights = None

    def __init__(self, model: KimiLinearLM, tensors: MappedCheckpoint) -> None:
        self._model = model
        self._tensors = tensors
        self._release = {key.module: key.release for key in key_maps(model.config)}
        decoder = model.model
        # One value seen as a matrix: it says the shape, dtype and device of the model, and takes no memory.
        nothing = torch.full((), math.nan, dtype=decoder.embed_tokens.weight.dtype)
        shape = decoder.embed_tokens.weight.shape
        decoder.embed_tokens.weight = nn.Parameter(nothing.expand(shape), requires_grad=False)
        for index, block in enumerate(decoder.blocks()):
            if isinstance(block.mlp, MixtureOfExperts):
                names = [self._release[f"model.layers.{index}.mlp.experts.{name}"] for name in ("w1", "w3", "w2")]
                # On the instance, so that names and parameters stay.
                forward = _StreamedExperts(tensors, list(zip(*names, strict=True)))
                block.mlp.experts.forward = forward  # type: ignore[method-assign]

    @property
    def bytes_read(self) -> int:
        """Bytes of weights mapped so far."""
        return self._tensors.bytes_read

    @property
    def stored_bytes(self) -> int:
        """Bytes of all weights in the files."""
        return self._tensors.stored_bytes

    def resident_bound(self, rows: int, tokens: int, context: int) -> int:
        """Return the most bytes that generation adds to what the process held before the model was opened.

        The equation is in `kimi_linear.inference.resident`.

        Args:
            rows: Sequences at a time.
            tokens: Most tokens of one sequence in one call: the prompt, or the prefill_chunk.
            context: Most tokens of one sequence in the cache.
        """
        return resident.resident_bound(self._model, rows=rows, tokens=tokens, context=context)

    def takes(self) -> bool:
        """Whether the next call of the model runs here: always, or it is refused."""
        if self._model.training:
            self.require_weights()
        return True

    def step(self, input_ids: Tensor, cache: Cache) -> None:
        """Return nothing: one token takes the way of all calls."""

    @torch.no_grad()
    def hidden(self, input_ids: Tensor, cache: Cache | None, cu_seqlens: Tensor | None) -> Tensor:
        """Return the normed hidden states [B, T, D]; arguments as for the decoder."""
        decoder = self._model.model
        stream = decoder.residual.start(self._embed(input_ids))
        with self._bar(is_shown=input_ids.numel() > input_ids.shape[0]) as advance:
            for index, block in enumerate(decoder.blocks()):
                state = None if cache is None else cache.layers[index]
                arguments = (stream, decoder.residual, index, state, cu_seqlens)
                stream = functional_call(block, self._read(f"model.layers.{index}", block), arguments)
                advance()
        return functional_call(decoder.norm, self._read("model.norm", decoder.norm), decoder.residual.finish(stream))

    @torch.no_grad()
    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states [..., D]."""
        config = self._model.config
        name = _EMBEDDING if config.tie_embeddings else _HEAD
        # Flat: for a slice of more axes torch may copy the whole matrix.
        x = hidden.reshape(-1, hidden.shape[-1])
        logits = x.new_empty(len(x), config.vocab_size)
        step = resident.head_rows(self._model)
        for start in range(0, config.vocab_size, step):
            rows = slice(start, min(start + step, config.vocab_size))
            logits[:, rows] = F.linear(x, self._tensors.read(name, rows).to(x.dtype))
        return logits.unflatten(0, hidden.shape[:-1])

    def require_weights(self) -> None:
        """Raise ConfigError: they are in their files."""
        raise ConfigError(
            f"this model reads its weights from {self._tensors.directory} while it runs: it cannot be trained, scored "
            "against labels, packed or saved; load it without stream_weights."
        )

    def _embed(self, input_ids: Tensor) -> Tensor:
        weight = self._model.model.embed_tokens.weight
        tokens, places = input_ids.unique(return_inverse=True)
        rows = torch.empty(len(tokens), weight.shape[1], dtype=weight.dtype)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.copy_(self._tensors.read(_EMBEDDING, slice(token, token + 1))[0])
        return rows[places]

    def _read(self, prefix: str, module: nn.Module) -> dict[str, Tensor]:
        """Return a module's parameters, but for those of the routed experts."""
        found = {}
        for name, parameter in module.named_parameters():
            release = self._release[f"{prefix}.{name}"]
            if not name.startswith("mlp.experts."):
                found[name] = self._tensors.read(release[0]).to(parameter.dtype).reshape(parameter.shape)
        return found

    @contextmanager
    def _bar(self, is_shown: bool) -> Iterator[Callable[[], object]]:
        before = self.bytes_read
        total = len(self._model.model.blocks())
        # None: on a terminal only.
        hidden = None if is_shown else True
        with tqdm(total=total, unit="layer", leave=False, mininterval=0, disable=hidden) as bar:

            def advance() -> None:
                bar.set_postfix_str(tqdm.format_sizeof(self.bytes_read - before, "B"), refresh=False)
                bar.update()

            yield advance


@dataclass
class _StreamedExperts:
    """The forward of `Experts` that maps one expert after the other, and none that no token chose.

    `names` are an expert's release tensors: w1, w3 and w2.
    """

    tensors: MappedCheckpoint
    names: list[tuple[str, str, str]]

    def __call__(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        total = x.new_zeros(x.shape, dtype=compute_dtype(x))
        plan = plan_runs(experts, len(self.names))
        for expert, run in plan.runs:
            w1, w3, w2 = (self.tensors.read(name).to(x.dtype)[None] for name in self.names[expert])
            token = plan.token[run]
            weight = weights.flatten()[plan.order[run], None]
            y = grouped_mlp(x[token], w1, w3, w2, weight, torch.zeros_like(token)[:, None])
            total.index_add_(0, token, y.to(total.dtype))
        return total.to(x.dtype)
