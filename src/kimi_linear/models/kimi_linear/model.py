"""The causal language model: decoder, output head, loss; dense, packed and padded batches; with or without a cache."""

import dataclasses

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from kimi_linear.base.errors import ConfigError, DtypeError, ShapeError, StateError
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.nn.decoder import Decoder
from kimi_linear.nn.ffn.moe import MixtureOfExperts
from kimi_linear.nn.init import init_weights
from kimi_linear.nn.linear import weight_of
from kimi_linear.nn.padding import Padding, last_positions
from kimi_linear.nn.state import Cache
from kimi_linear.ops.cross_entropy import linear_cross_entropy

IGNORE_INDEX = -100


@dataclasses.dataclass
class ModelOutput:
    """What a forward returns.

    Fields: `logits`, in the model's dtype, [B, T, V] (or one position a sequence with last_only), or None when labels
    were given; `loss`, the mean cross entropy in float32, or None without labels; `cache`, the one that was passed in.
    """

    logits: Tensor | None
    loss: Tensor | None
    cache: Cache | None


class KimiLinearLM(nn.Module):
    """A causal language model built from a configuration, with freshly drawn weights.

    Parameters are named as in the released checkpoint. Built under `torch.device("meta")` it allocates nothing; then
    `to_empty(device=...)` and `init_weights()`, or a checkpoint, fill it.

    Args:
        config: The network.
        generator: Source of the weights; default: torch's global one.

    Example:
        >>> from kimi_linear.models.kimi_linear.presets import preset
        >>> model = KimiLinearLM(preset("tiny"))
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 256])
    """

    def __init__(self, config: KimiLinearConfig, *, generator: Generator | None = None) -> None:
        super().__init__()
        self.config = config
        device = torch.get_default_device()
        # The parts are shaped without memory, then allocated and drawn once.
        with torch.device("meta"):
            self.model = Decoder(
                config.layer_blocks,
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                norm_eps=config.norm_eps,
                residual=config.residual,
                pad_token_id=config.pad_token_id,
            )
            self.lm_head = (
                None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            )
        if device.type != "meta":
            self.to_empty(device=device)
            self.init_weights(generator)

    def init_weights(self, generator: Generator | None = None) -> None:
        """Draw every parameter afresh, in place; the same generator state gives the same weights."""
        init_weights(self, self.config.initializer_range, generator)

    @property
    def head_weight(self) -> Tensor:
        """The output head, [V, D], adapters included: the embedding itself if tied."""
        embedding = self.model.embed_tokens
        if self.lm_head is not None:
            return weight_of(self.lm_head, self.config.hidden_size, embedding.weight)
        if isinstance(embedding, nn.Embedding):
            return embedding.weight
        rows: Tensor = embedding(torch.arange(self.config.vocab_size, device=embedding.weight.device))
        return rows

    def new_cache(self, batch_size: int, *, dtype: torch.dtype | None = None) -> Cache:
        """Return the cache before the first token of `batch_size` sequences, on the model's device.

        Args:
            batch_size: Rows.
            dtype: Of everything remembered but the recurrent states; default: the model's.
        """
        if batch_size < 1:
            raise ShapeError(f"new_cache: batch_size is {batch_size}, expected at least 1.")
        weight = self.model.embed_tokens.weight
        states = self.model.new_states(batch_size, device=weight.device, dtype=dtype or weight.dtype)
        return Cache(states, torch.zeros(batch_size, dtype=torch.int64, device="cpu"))

    def update_router_bias(self) -> None:
        """Balance the experts: update every selection bias from the load since the last call. Once a step."""
        for module in self.modules():
            if isinstance(module, MixtureOfExperts):
                module.update_router_bias()

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        cache: Cache | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        return_logits: bool = False,
        last_only: bool = False,
    ) -> ModelOutput:
        """Run the network.

        The result of a sequence does not depend on how it is given: dense, packed among others, padded on any side,
        or in pieces through a cache.

        Args:
            input_ids: Token ids, [B, T].
            labels: [B, T], aligned with input_ids: position t is scored on label t + 1, never across sequences, and
                labels of -100 are not scored. The first token of a call is never scored, cache or not. With labels
                the logits are not built.
            cache: Continue each sequence from it, and update it in place. It has one row a sequence; rows may hold
                different numbers of tokens. After an error it must be thrown away. One token at a time is fast under
                `torch.no_grad()`, where it takes the one-token operators; gradients never flow into a cache.
            cu_seqlens: Offsets [N + 1] of sequences packed in one row [1, T].
            attention_mask: [B, T], 1 at real tokens and 0 at padding, anywhere; of the tokens of this call only.
                Padding reaches no state and no loss, and its logits are zero.
            return_logits: Build the logits also when labels are given.
            last_only: Build only the logits of each sequence's last token: [B, 1, V], packed [1, N, V]. An empty
                sequence has zeros.

        Raises:
            ShapeError: A shape disagrees; names the argument, what it is and what it should be.
            StateError: The cache does not fit the model or the batch.

        Example:
            >>> from kimi_linear.models.kimi_linear.presets import preset
            >>> model, ids = KimiLinearLM(preset("tiny")), torch.arange(8)[None]
            >>> cache = model.new_cache(1)
            >>> with torch.no_grad():
            ...     _ = model(ids[:, :5], cache=cache)
            ...     last = model(ids[:, 5:], cache=cache, last_only=True).logits
            >>> last.shape
            torch.Size([1, 1, 256])
        """
        self._check_inputs(input_ids, labels, cu_seqlens, attention_mask)
        padding = None
        if attention_mask is not None and not bool(attention_mask.all()):
            padding = Padding.from_mask(attention_mask)
            input_ids, cu_seqlens = padding.pack(input_ids), padding.cu_seqlens
            labels = None if labels is None else padding.pack(labels)
        if input_ids.shape[1] == 0:
            raise ShapeError("the batch holds no token; give at least one.")
        self._check_cache(cache, input_ids.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)

        hidden = self._hidden(input_ids, cache, cu_seqlens)
        if cache is not None:
            cache.lengths = cache.lengths + (input_ids.shape[1] if cu_seqlens is None else cu_seqlens.diff().cpu())
        loss = None if labels is None else self._loss(hidden, labels, cu_seqlens)
        logits = None
        if labels is None or return_logits:
            logits = self._logits(hidden, cu_seqlens, padding, last_only)
        return ModelOutput(logits=logits, loss=loss, cache=cache)

    def _hidden(self, input_ids: Tensor, cache: Cache | None, cu_seqlens: Tensor | None) -> Tensor:
        """Return the normed hidden states [B, T, D]; a cache's states are updated in place, its lengths are not."""
        return self.model(input_ids, None if cache is None else cache.layers, cu_seqlens)

    def _head(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states [..., D]."""
        return F.linear(hidden, self.head_weight) if self.lm_head is None else self.lm_head(hidden)

    def _logits(self, hidden: Tensor, cu_seqlens: Tensor | None, padding: Padding | None, last_only: bool) -> Tensor:
        if not last_only:
            logits = self._head(hidden)
            return logits if padding is None else padding.unpack(logits)
        if cu_seqlens is None:
            return self._head(hidden[:, -1:])
        last, has_token = last_positions(cu_seqlens)
        logits = self._head(hidden[:, last]) * has_token[:, None]
        return logits if padding is None else logits.transpose(0, 1)

    def _loss(self, hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        if cu_seqlens is not None:
            last, has_token = last_positions(cu_seqlens)
            targets = targets.index_fill(1, last[has_token], IGNORE_INDEX)
        return linear_cross_entropy(
            hidden.flatten(0, 1), self.head_weight, targets.flatten(), ignore_index=IGNORE_INDEX
        )

    def _check_inputs(
        self, input_ids: Tensor, labels: Tensor | None, cu_seqlens: Tensor | None, attention_mask: Tensor | None
    ) -> None:
        if input_ids.dim() != 2:
            raise ShapeError(f"input_ids is {list(input_ids.shape)}, expected [B, T].")
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise DtypeError(f"input_ids is {input_ids.dtype}, expected int64 or int32 token ids.")
        for name, tensor in (("labels", labels), ("attention_mask", attention_mask)):
            if tensor is not None and tensor.shape != input_ids.shape:
                raise ShapeError(
                    f"{name} is {list(tensor.shape)}, expected the shape of input_ids, {list(input_ids.shape)}."
                )
        if cu_seqlens is not None:
            if attention_mask is not None:
                raise ConfigError(
                    "cu_seqlens and attention_mask were both given; a batch is packed or padded, not both."
                )
            if input_ids.shape[0] != 1 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
                raise ShapeError(
                    f"input_ids is {list(input_ids.shape)} and cu_seqlens {list(cu_seqlens.shape)}, expected one "
                    "packed row [1, T] and offsets [N + 1]."
                )
        # On an accelerator the look would wait for the device.
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling() and input_ids.numel():
            low, high = int(input_ids.min()), int(input_ids.max())
            if low < 0 or high >= self.config.vocab_size:
                raise ShapeError(
                    f"input_ids holds {low if low < 0 else high}, expected token ids from 0 to "
                    f"{self.config.vocab_size - 1}; check that the tokenizer belongs to the model."
                )

    def _check_cache(self, cache: Cache | None, sequences: int) -> None:
        if cache is None:
            return
        if len(cache.layers) != self.config.num_layers:
            raise StateError(
                f"cache has {len(cache.layers)} layers, the model has {self.config.num_layers}; use its own."
            )
        if cache.batch_size != sequences:
            raise StateError(f"cache has {cache.batch_size} rows, the call has {sequences} sequences; make a new one.")
