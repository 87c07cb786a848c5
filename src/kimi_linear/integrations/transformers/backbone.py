"""The decoder as transformers and TRL call it: from token ids or embeddings to hidden states, no output head."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from kimi_linear.base.errors import ConfigError, ShapeError, StateError
from kimi_linear.base.registry import unknown_name
from kimi_linear.integrations.transformers.cache import KimiLinearCache
from kimi_linear.integrations.transformers.configuration import KimiLinearHybridConfig
from kimi_linear.nn.block import Block
from kimi_linear.nn.decoder import Decoder
from kimi_linear.nn.padding import Padding
from kimi_linear.nn.state import Cache

# What transformers' and TRL's collators say about sequences packed in one row.
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


class KimiLinearHybridPreTrainedModel(PreTrainedModel):
    """What both classes say of themselves."""

    config_class = KimiLinearHybridConfig
    config: KimiLinearHybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # `generate` then refuses what takes tokens back (assisted generation): recurrent states cannot.
    _is_stateful = True
    _no_split_modules = ["Block"]  # noqa: RUF012 -- transformers' own attribute

    def initialize_weights(self) -> None:
        """Do nothing: our modules draw their weights when they are built."""


class KimiLinearHybridModel(KimiLinearHybridPreTrainedModel):
    """Embedding, blocks and final norm of a decoder of ours, whose modules it takes over.

    Args:
        config: Of the network.
        decoder: The modules.
    """

    def __init__(self, config: KimiLinearHybridConfig, decoder: Decoder) -> None:
        super().__init__(config)
        self.embed_tokens = decoder.embed_tokens
        self.layers = decoder.layers
        self.norm = decoder.norm
        self.residual = decoder.residual
        self.gradient_checkpointing = False
        self.checkpoint_function: Callable[..., Any] | None = None
        self.checkpoint_every = 1
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KimiLinearCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **packing: Any,
    ) -> BaseModelOutputWithPast:
        """Return hidden states [B, T, D], zero at padding; arguments as for `KimiLinearHybridForCausalLM.forward`."""
        if output_attentions:
            raise ConfigError(
                "output_attentions is True, and most layers here have no attention weights; leave it out."
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("give one of input_ids and inputs_embeds, not both or neither.")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        B, T = x.shape[:2]
        padding, cu_seqlens = sequences_of(attention_mask, position_ids, packing, (B, T))
        if use_cache is None:
            use_cache = self.config.use_cache and not torch.is_grad_enabled()
        if past_key_values is None and use_cache:
            past_key_values = KimiLinearCache()
        state = self._state(past_key_values, B if cu_seqlens is None else cu_seqlens.shape[0] - 1)
        states = self._run(x if padding is None else padding.pack(x), state, cu_seqlens, bool(output_hidden_states))
        if past_key_values is not None and state is not None:
            state.lengths = state.lengths + (T if cu_seqlens is None else cu_seqlens.diff().cpu())
            past_key_values.advance(T)
        if padding is not None:
            states = [padding.unpack(each) for each in states]
        return BaseModelOutputWithPast(
            last_hidden_state=states[-1],
            past_key_values=past_key_values,
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def _run(self, x: Tensor, state: Cache | None, cu_seqlens: Tensor | None, keep_all: bool) -> list[Tensor]:
        """Return the normed hidden states, and before them the input of every layer if `keep_all`."""
        stream, kept = self.residual.start(x), []
        for index, block in enumerate(self.layers):
            if keep_all:
                kept.append(self.residual.finish(stream))
            arguments = (stream, self.residual, index, None if state is None else state.layers[index], cu_seqlens)
            if self._recomputes(index) and state is None:
                assert self.checkpoint_function is not None
                stream = self.checkpoint_function(block.__call__, *arguments)
            else:
                stream = block(*arguments)
        return [*kept, self.norm(self.residual.finish(stream))]

    def _recomputes(self, index: int) -> bool:
        return self.gradient_checkpointing and self.training and index % self.checkpoint_every == 0

    def _state(self, cache: Any, rows: int) -> Cache | None:
        """Return our cache inside transformers' one, made now if this is its first call."""
        if cache is None:
            return None
        if not isinstance(cache, KimiLinearCache):
            raise StateError(f"past_key_values is a {type(cache).__name__}, expected a KimiLinearCache, or None.")
        if cache.state is None:
            weight = self.embed_tokens.weight
            mixers = [cast(Block, block).self_attn for block in self.layers]
            layers = tuple(mixer.new_state(rows, device=weight.device, dtype=weight.dtype) for mixer in mixers)
            cache.state = Cache(layers, torch.zeros(rows, dtype=torch.int64, device="cpu"))
        if cache.state.batch_size != rows:
            raise StateError(f"past_key_values has {cache.batch_size} rows, the call has {rows}; make a new cache.")
        return cache.state


def sequences_of(
    mask: Tensor | None, position_ids: Tensor | None, packing: Mapping[str, Any], shape: tuple[int, int]
) -> tuple[Padding | None, Tensor | None]:
    """Return how a call [B, T] divides into sequences: its padding if it has any, and the offsets if it is not dense.

    Args:
        mask: [B, T], or longer with the cached columns first.
        position_ids: Those that start over in a single row divide it, where neither padding nor offsets do.
        packing: Arguments about packed sequences, by name.
        shape: (B, T).
    """
    for name in packing:
        if name not in _PACKING:
            raise ConfigError(f"forward: {unknown_name('argument', name, list(_PACKING))}")
    B, T = shape
    if mask is not None:
        if mask.dim() != 2 or mask.shape[0] != B or mask.shape[1] < T:
            raise ShapeError(
                f"attention_mask is {list(mask.shape)}, expected [{B}, {T}] or cached columns before that."
            )
        if not bool(mask[:, -T:].all()):
            padding = Padding.from_mask(mask[:, -T:])
            return padding, padding.cu_seqlens
    offsets, keys = packing.get("cu_seq_lens_q"), packing.get("cu_seq_lens_k")
    if offsets is not None:
        if B != 1 or (keys is not None and not torch.equal(offsets, keys)):
            raise ShapeError(
                f"cu_seq_lens_q came with {B} rows or another cu_seq_lens_k, expected one packed row and equal offsets."
            )
        return None, offsets.to(torch.int32)
    return None, None if position_ids is None or T == 1 else _restarts(position_ids, B, T)


def _restarts(position_ids: Tensor, B: int, T: int) -> Tensor | None:
    """Return the offsets of the sequences that positions show, None if there is one a row."""
    starts = position_ids.diff(dim=-1).reshape(-1, T - 1) != 1
    if not bool(starts.any()):
        return None
    if B != 1:
        raise ShapeError(f"position_ids start over inside {B} rows, expected one packed row: padding_free=True in TRL.")
    inner = starts[0].nonzero().flatten() + 1
    return torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), T)]).to(torch.int32)
