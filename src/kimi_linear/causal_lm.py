"""The model people use: the network, with loading, saving and generation on it."""

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Self, TypeVar

import torch
from torch import Generator, Tensor

from kimi_linear.base.config import check_keys
from kimi_linear.base.errors import ConfigError
from kimi_linear.checkpoint.configs import read_end_tokens, with_switches
from kimi_linear.checkpoint.gguf.read import read_gguf_end_tokens
from kimi_linear.checkpoint.hub import is_gguf, resolve
from kimi_linear.checkpoint.load import load_checkpoint
from kimi_linear.checkpoint.save import save_checkpoint
from kimi_linear.inference import generate as generation
from kimi_linear.inference.native.engine import NativeModel
from kimi_linear.inference.params import SamplingParams
from kimi_linear.inference.prompts import PromptIds, pad_left, read_prompts
from kimi_linear.inference.streamed import StreamedModel, open_streamed
from kimi_linear.inference.text import TokenDecoder
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.models.kimi_linear.model import KimiLinearLM, ModelOutput
from kimi_linear.nn.state import Cache
from kimi_linear.ops.linear.packed import WeightFormat


class KimiLinearForCausalLM(KimiLinearLM):
    """A Kimi Linear language model that loads, saves and generates.

    `end_token_ids` are the tokens at which generation stops by default: those of the configuration, and of the
    checkpoint's generation_config.json.

    Args:
        config: The network.
        generator: Source of the fresh weights; default: torch's global one.

    Example:
        >>> from kimi_linear import KimiLinearForCausalLM, preset
        >>> model = KimiLinearForCausalLM(preset("tiny"))
        >>> model.generate([[1, 2, 3]], max_new_tokens=5, temperature=0.0).shape
        torch.Size([1, 8])
    """

    def __init__(self, config: KimiLinearConfig, *, generator: Generator | None = None) -> None:
        super().__init__(config, generator=generator)
        self.end_token_ids = generation.end_tokens(config)
        # What runs calls in place of the modules, if anything does.
        self._engine: NativeModel | StreamedModel | None = None
        # Whether the call under way runs on it.
        self._runs_engine = False

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        dtype: str | torch.dtype | None = None,
        device: str | torch.device = "cpu",
        *,
        weights: WeightFormat | None = None,
        keep_weights: bool = True,
        stream_weights: bool = False,
        latent_norm_eps: float | None = None,
        biased_combine: bool = False,
    ) -> Self:
        """Return the model of a checkpoint, in evaluation mode.

        Args:
            path: A checkpoint directory, a GGUF file (with the package gguf), or a hub name whose files are in the
                local cache; nothing is downloaded.
            dtype: Of the weights, "bfloat16" for instance; default: as stored, float32 for a GGUF file with scales.
                Decay rates, gate biases and router biases stay float32.
            device: Where the weights go. Peak memory there is the model itself.
            weights: Prepare the model for inference with weights of that kind; see `prepare_for_inference`.
            keep_weights: As there.
            stream_weights: Leave the weights in their files and map each layer while it runs, and only the experts
                that tokens chose: for a model larger than memory, on the CPU. Memory then has the bound that
                `streamed.resident_bound` states. The model generates; it cannot be trained, saved or packed.
            latent_norm_eps: Epsilon of latent attention's norm; default: the checkpoint's, 1e-6 as in the published
                code. 1e-5 is what vLLM, SGLang, mlx-lm and llama.cpp take.
            biased_combine: Weigh experts with the selection bias, as the published code does by mistake. Only to
                reproduce its numbers; a model loaded so is saved under a type of our own.

        Raises:
            ConfigError: A switch's value is not one, or the model has no part that it changes.
            CheckpointError: Nothing there, damaged, or not of a model this package has; says which file or tensor.
            DtypeError: Not a dtype of weights.
            DeviceError: No such device here.
            ConfigError: stream_weights with another device than the CPU, with `weights`, or of a GGUF file.
        """
        directory = resolve(path)
        end_token_ids = read_gguf_end_tokens(directory) if is_gguf(directory) else read_end_tokens(directory)
        build = partial(_build, cls, latent_norm_eps, biased_combine)
        if stream_weights:
            if weights is not None or str(device) != "cpu":
                raise ConfigError("stream_weights runs stored weights on the CPU; give neither weights nor a device.")
            if is_gguf(directory):
                raise ConfigError(f"stream_weights reads safetensors, and {directory} is a GGUF file; export it first.")
            model, engine = open_streamed(directory, build, dtype)
            model._engine = engine
        else:
            model = load_checkpoint(directory, build, dtype=dtype, device=device)
        model.end_token_ids = tuple(sorted({*model.end_token_ids, *end_token_ids}))
        return model if weights is None else model.prepare_for_inference(weights, keep_weights=keep_weights)

    def prepare_for_inference(self, weights: WeightFormat, *, keep_weights: bool = True) -> Self:
        """Pack the weights for fast inference on the CPU, and use them from now on wherever a call allows it.

        `generate`, `stream` and calls without gradients in evaluation mode then multiply with packed matrices, and one
        token a row goes through the whole network in one native call. The results are those of the plain model up to
        the rounding of the weights. All other calls run the plain modules. Caches go back and forth between the two.
        When a parameter has changed since, the next call packs again. Copies of the model are not prepared.

        Args:
            weights: What matrices are packed as: "float32", "bfloat16", or integers with a scale for 32 weights,
                "int8" or "int4". The embedding, norms, convolutions, routers and the latent attention's kv_b_proj
                stay as they are. Activations and caches keep the model's dtype; dot products round them to bfloat16
                for "bfloat16" and to int8 for integers, where the processor has such instructions.
            keep_weights: False gives the packed parameters' memory back. The model then only runs as described, and
                can no longer be trained, saved or moved.

        Returns:
            The model itself.

        Raises:
            ConfigError: The model is not on the CPU or not float32 or bfloat16, or there are no native kernels.

        Cost: a pass over the weights; the packed ones take 4, 2, 1.06 or 0.56 bytes each.

        Example:
            >>> from kimi_linear import KimiLinearForCausalLM, preset
            >>> model = KimiLinearForCausalLM(preset("tiny")).eval().prepare_for_inference("float32")
            >>> model.generate([[1, 2, 3]], max_new_tokens=5, temperature=0.0).shape
            torch.Size([1, 8])
        """
        if self._engine is not None:
            self._engine.require_weights()
        self._engine = NativeModel(self, weights, keep_weights)
        return self

    @property
    def streamed(self) -> StreamedModel | None:
        """What reads the weights of a model loaded with stream_weights: its memory bound and bytes read; or None."""
        return self._engine if isinstance(self._engine, StreamedModel) else None

    @property
    def prepared_weights(self) -> WeightFormat | None:
        """What the weights were packed as by `prepare_for_inference`, or None."""
        return None if self._engine is None else self._engine.weights

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
        """Run the network; see `KimiLinearLM.forward`."""
        if self._engine is not None and cache is not None and labels is cu_seqlens is attention_mask is None:
            logits = self._engine.step(input_ids, cache)
            if logits is not None:
                return ModelOutput(logits=logits, loss=None, cache=cache)
        return super().forward(
            *(input_ids, labels, cache, cu_seqlens, attention_mask), return_logits=return_logits, last_only=last_only
        )

    def _hidden(self, input_ids: Tensor, cache: Cache | None, cu_seqlens: Tensor | None) -> Tensor:
        self._runs_engine = self._engine is not None and self._engine.takes()
        if self._engine is not None and self._runs_engine:
            return self._engine.hidden(input_ids, cache, cu_seqlens)
        return super()._hidden(input_ids, cache, cu_seqlens)

    def _head(self, hidden: Tensor) -> Tensor:
        if self._engine is not None and self._runs_engine:
            return self._engine.head(hidden)
        return super()._head(hidden)

    def _loss(self, hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        if self._engine is not None:
            self._engine.require_weights()
        return super()._loss(hidden, labels, cu_seqlens)

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        max_shard_size: int | str = "5GB",
        tokenizer_file: str | os.PathLike[str] | None = None,
        *,
        tokenizer_from: str | os.PathLike[str] | None = None,
        license: str | None = None,
        base_model: str | None = None,
    ) -> None:
        """Write a checkpoint directory in the released layout, whole or not at all.

        A model that the released type can hold gets that type's configuration, so other tools load it; any other gets
        our own, one that was loaded with biased_combine included. A latent_norm_eps of 1e-5 is written beside the
        released keys for us; other engines have their own. A model card is written where there is no README.md. An
        existing checkpoint at `path` is replaced; the files beside its weights are carried along.

        Args:
            path: The directory to write: new, empty, or that of a checkpoint.
            max_shard_size: Bytes of tensors in one file, as a number or as "5GB" or "500MiB".
            tokenizer_file: A tokenizer.json to put beside the weights.
            tokenizer_from: A directory whose whole tokenizer, chat template included, to put beside the weights.
            license: Of the weights, "mit" for instance; for the model card.
            base_model: Hub name of what the model was made from; for the model card.

        Raises:
            CheckpointError: The path is none of these, there is no tokenizer, or the disk is full or not writable;
                what was there before is unchanged.
            ConfigError: The shard size is not one, the tokenizer was given twice, or the weights were released by
                `prepare_for_inference`.
        """
        if self._engine is not None:
            self._engine.require_weights()
        save_checkpoint(
            self.state_dict(),
            self.config,
            path,
            max_shard_size=max_shard_size,
            end_token_ids=self.end_token_ids,
            tokenizer_file=tokenizer_file,
            tokenizer_from=tokenizer_from,
            license=license,
            base_model=base_model,
        )

    def generate(
        self,
        input_ids: PromptIds,
        params: SamplingParams | None = None,
        *,
        attention_mask: Tensor | None = None,
        tokenizer: TokenDecoder | None = None,
        cache: Cache | None = None,
        prefill_chunk: int | None = None,
        **sampling: Any,
    ) -> Tensor:
        """Return the prompts with what was generated behind them.

        Args:
            input_ids: Prompts [B, T] or [T], or lists of tokens that may differ in length.
            params: How to pick tokens; or give its fields here by name: max_new_tokens=64, temperature=0.7, seed=1.
            attention_mask: [B, T], 1 at tokens and 0 at padding (left or right); only with a tensor of prompts.
            tokenizer: Needed for stop strings.
            cache: Continue from it, as `stream` of `kimi_linear.inference.generate` says.
            prefill_chunk: Read the prompt in pieces of this many tokens, to bound memory.
            **sampling: Fields of SamplingParams. stop_token_ids defaults to the model's `end_token_ids`.

        Returns:
            Token ids, [B, T + new], int64. The first T columns are input_ids as given (lists: padded on the left to
            the longest); the new tokens follow, a stop token included, padded on the right where a row ended early.
            Padding is the model's pad token, else its eos token, else 0.

        Raises:
            ConfigError: An unknown field, a value out of range, or a prompt that leaves no room in the context.
            ShapeError: The prompts are not rows of tokens, or the mask does not fit.
        """
        output = generation.generate(
            self,
            input_ids,
            self._sampling_params(params, sampling),
            attention_mask=attention_mask,
            tokenizer=tokenizer,
            cache=cache,
            prefill_chunk=prefill_chunk,
        )
        fill = next(token for token in (self.config.pad_token_id, self.config.eos_token_id, 0) if token is not None)
        prompts = self._prompt_columns(input_ids, fill)
        longest = max(len(row) for row in output.ids)
        new = torch.tensor([[*row, *[fill] * (longest - len(row))] for row in output.ids], device=prompts.device)
        return torch.cat([prompts, new], dim=1)

    def stream(
        self,
        input_ids: PromptIds,
        params: SamplingParams | None = None,
        *,
        attention_mask: Tensor | None = None,
        tokenizer: TokenDecoder | None = None,
        cache: Cache | None = None,
        prefill_chunk: int | None = None,
        **sampling: Any,
    ) -> Iterator[generation.TokenEvent]:
        """Yield every new token as it is picked, with its text; arguments as for `generate`.

        Example:
            >>> from kimi_linear import KimiLinearForCausalLM, preset
            >>> model = KimiLinearForCausalLM(preset("tiny"))
            >>> [event.finish_reason for event in model.stream([[1, 2, 3]], max_new_tokens=2)]
            [None, 'length']
        """
        return generation.stream(
            self,
            input_ids,
            self._sampling_params(params, sampling),
            attention_mask=attention_mask,
            tokenizer=tokenizer,
            cache=cache,
            prefill_chunk=prefill_chunk,
        )

    def _sampling_params(self, params: SamplingParams | None, sampling: dict[str, Any]) -> SamplingParams:
        check_keys(SamplingParams, sampling, "generate")
        if params is not None and sampling:
            raise ConfigError(f"generate: params and {', '.join(sampling)} were both given; put them into params.")
        params = params or SamplingParams(**sampling)
        return params if params.stop_token_ids is not None else replace(params, stop_token_ids=self.end_token_ids)

    def _prompt_columns(self, input_ids: PromptIds, fill: int) -> Tensor:
        if isinstance(input_ids, Tensor):
            return input_ids.reshape(-1, input_ids.shape[-1]).long()
        rows = read_prompts(input_ids, None, self.config.vocab_size)
        return pad_left(rows, fill)[0].to(self.model.embed_tokens.weight.device)


M = TypeVar("M", bound=KimiLinearForCausalLM)


def _build(cls: type[M], latent_norm_eps: float | None, biased_combine: bool, config: KimiLinearConfig) -> M:
    return cls(with_switches(config, latent_norm_eps, biased_combine))


def load_model(
    path: str | os.PathLike[str],
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    weights: WeightFormat | None = None,
    keep_weights: bool = True,
    stream_weights: bool = False,
    latent_norm_eps: float | None = None,
    biased_combine: bool = False,
) -> KimiLinearForCausalLM:
    """Return the model of a checkpoint: `KimiLinearForCausalLM.from_pretrained` under a shorter name."""
    return KimiLinearForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        device=device,
        weights=weights,
        keep_weights=keep_weights,
        stream_weights=stream_weights,
        latent_norm_eps=latent_norm_eps,
        biased_combine=biased_combine,
    )
