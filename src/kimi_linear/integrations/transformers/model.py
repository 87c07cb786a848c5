"""Our network as a transformers model: `generate`, Trainer, PEFT and TRL run on it; its files are our own."""

import os
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from kimi_linear.base.errors import ConfigError
from kimi_linear.inference.generate import end_tokens
from kimi_linear.integrations.transformers import files
from kimi_linear.integrations.transformers.backbone import (
    KimiLinearHybridModel,
    KimiLinearHybridPreTrainedModel,
    sequences_of,
)
from kimi_linear.integrations.transformers.cache import KimiLinearCache
from kimi_linear.integrations.transformers.configuration import KimiLinearHybridConfig
from kimi_linear.models.kimi_linear.model import IGNORE_INDEX, KimiLinearLM
from kimi_linear.nn.linear import weight_of
from kimi_linear.nn.padding import last_positions
from kimi_linear.ops.cross_entropy import linear_cross_entropy


class KimiLinearHybridForCausalLM(KimiLinearHybridPreTrainedModel, GenerationMixin):
    """A Kimi Linear language model for everything that takes a transformers model.

    Its modules are ours, under the names of `KimiLinearForCausalLM`, so those are the names for LoRA: `q_proj`,
    `k_proj`, `v_proj`, `o_proj`, `f_a_proj`, `f_b_proj`, `g_a_proj`, `g_b_proj`, `b_proj`, `kv_a_proj_with_mqa`,
    `kv_b_proj`, `gate_proj`, `up_proj`, `down_proj`, and as target_parameters `experts.w1`, `experts.w2`, `experts.w3`.

    Args:
        config: Of the network.
        network: Take over its modules instead of drawing fresh weights.

    Example:
        >>> from kimi_linear import preset
        >>> model = KimiLinearHybridForCausalLM(KimiLinearHybridConfig(preset("tiny")))
        >>> model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False).shape
        torch.Size([1, 5])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 -- transformers' own name
    # The loss knows num_items_in_batch, so the Trainer leaves gradient accumulation to it.
    accepts_loss_kwargs = True

    def __init__(self, config: KimiLinearHybridConfig, network: KimiLinearLM | None = None) -> None:
        super().__init__(config)
        network = KimiLinearLM(config.network) if network is None else network
        self.model = KimiLinearHybridModel(config, network.model)
        # With tied embeddings the head is a second name of the embedding, as elsewhere in transformers.
        self.lm_head = _tied_head(network.model.embed_tokens) if network.lm_head is None else network.lm_head
        self.generation_config.eos_token_id = list(end_tokens(config.network)) or None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KimiLinearCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **packing: Any,
    ) -> CausalLMOutputWithPast:
        """Run the network.

        In training mode with labels the logits are not built (`logits` is None) unless `logits_to_keep` asks for them:
        the loss takes the head a chunk of tokens at a time. Trainer and TRL's trainers do not read them then. In
        evaluation mode they are built beside the loss, for metrics.

        Args:
            input_ids: Token ids, [B, T]; or `inputs_embeds`, [B, T, D].
            attention_mask: [B, T], 1 at real tokens and 0 at padding, anywhere; it may cover cached columns too.
            position_ids: Read for one thing: in a batch of one row, positions that start over divide it into packed
                sequences. Nothing here depends on the position that a sequence starts at.
            past_key_values: Continue from it, and update it in place.
            inputs_embeds: In place of input_ids.
            labels: [B, T], aligned with input_ids: position t is scored on label t + 1, never across sequences, and
                labels of -100 are not scored.
            use_cache: Return a cache. Default: the configuration's, and never where gradients are recorded, since none
                flow into a cache.
            logits_to_keep: How many last positions get logits, or their indices; 0: all.
            num_items_in_batch: Divide the summed loss by it (labels of all accumulated batches); default: the mean.
            output_hidden_states: Return the input of every layer, and the normed output of the last.
            output_attentions: Only False, since most layers have no attention weights.
            return_dict: Only None or True.
            **packing: What collators of packed sequences add: `cu_seq_lens_q`, offsets [N + 1] of sequences packed in
                one row [1, T], and `cu_seq_lens_k`, the same; `max_length_q`, `max_length_k`, `seq_idx` add nothing.

        Raises:
            ConfigError, ShapeError, StateError: Arguments that do not fit or cannot be honoured; says which.
        """
        if return_dict is False:
            raise ConfigError("return_dict is False, expected True or None: the result is read by name here.")
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            **packing,
        )
        hidden, loss, logits = output.last_hidden_state, None, None
        if labels is not None:
            shape = (labels.shape[0], labels.shape[1])
            padding, cu_seqlens = sequences_of(attention_mask, position_ids, packing, shape)
            targets = _targets(labels, attention_mask if padding else None, cu_seqlens if padding is None else None)
            loss = self._loss(hidden, targets, num_items_in_batch)
        if labels is None or not self.training or logits_to_keep is not None:
            logits = self.lm_head(_kept(hidden, logits_to_keep))
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
        )

    def _loss(self, hidden: Tensor, targets: Tensor, num_items: Tensor | int | None) -> Tensor:
        weight = weight_of(self.lm_head, self.config.hidden_size, hidden)
        reduction: Literal["mean", "sum"] = "mean" if num_items is None else "sum"
        loss = linear_cross_entropy(
            hidden.flatten(0, 1), weight, targets.flatten(), ignore_index=IGNORE_INDEX, reduction=reduction
        )
        return loss if num_items is None else loss / torch.as_tensor(num_items, device=loss.device)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        """Recompute every n-th block in the backward pass, or none; transformers' own methods call this."""
        self.model.gradient_checkpointing = enable
        self.model.checkpoint_function, self.model.checkpoint_every = gradient_checkpointing_func, every_n_layers

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Put our cache where `generate` expects one, unless it was given or is not wanted."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ConfigError(
                f"cache_implementation is {generation_config.cache_implementation!r}, expected None: this model "
                "keeps a KimiLinearCache."
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = KimiLinearCache()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        config: KimiLinearHybridConfig | None = None,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device_map: str | int | torch.device | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Return the model of a checkpoint in any layout that `kimi_linear.load_model` reads, in evaluation mode.

        Args:
            pretrained_model_name_or_path: A directory, or a hub name whose files are in the local cache.
            *model_args: None.
            config: As read from the same place; special tokens and `use_cache` may differ from the file's.
            dtype: Of the weights; default and "auto": as stored.
            torch_dtype: The old name of dtype.
            device_map: None or "cpu"; "auto" for the accelerator if there is one; a device; or {"": device}.
            **kwargs: What asks for nothing beyond a local read, such as local_files_only=True.

        Raises:
            CheckpointError: Nothing there, damaged, or not of a model this package has; says which file or tensor.
            ConfigError: An argument that cannot be honoured; says which.
        """
        path = files.checkpoint_directory(pretrained_model_name_or_path, kwargs, model_args)
        network = files.load_network(path, dtype if dtype is not None else torch_dtype, device_map)
        if config is None:
            config = cls.config_class(network.config, name_or_path=str(pretrained_model_name_or_path))
        files.check_config(config.network, network.config)
        config.dtype = network.model.embed_tokens.weight.dtype
        model = cls(config, network)
        model.generation_config = files.read_generation_config(path, model.generation_config)
        return model.eval()

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write a checkpoint in the released layout, as `KimiLinearForCausalLM.save_pretrained` does, atomically.

        Into a directory that also holds other things, as a Trainer's output does, the files are moved one by one.

        Args:
            save_directory: The directory to write.
            is_main_process: False does nothing.
            state_dict: Tensors to save in place of the model's.
            max_shard_size: Bytes of tensors in one file, as a number or as "5GB" or "500MiB".
            safe_serialization: Only True: weights are safetensors.
            **kwargs: What is None or False.

        Raises:
            CheckpointError: It cannot be written, or the model carries adapters; says what to do.
            ConfigError: An argument that cannot be honoured.
        """
        files.refuse("save_pretrained", {**kwargs, "safe_serialization=False": not safe_serialization})
        if is_main_process:
            state = dict(self.state_dict() if state_dict is None else state_dict)
            if self.config.tie_word_embeddings:
                state.pop("lm_head.weight", None)
            files.save(state, self.config.network, self.generation_config, save_directory, max_shard_size)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Copy tensors into the parameters: under the module's names, or under those of a checkpoint as it is saved.

        A Trainer that resumes reads the file of a checkpoint and calls this.
        """
        renamed = files.module_names(state_dict, self.state_dict(), self.config.network)
        return super().load_state_dict(renamed, strict, assign)


def _tied_head(embedding: nn.Embedding) -> nn.Linear:
    with torch.device("meta"):
        head = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False)
    head.weight = embedding.weight
    return head


def _targets(labels: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Return the label that each position should predict, [B, T]."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    if mask is not None:
        targets = targets.masked_fill(mask[:, -labels.shape[1] :] == 0, IGNORE_INDEX)
    if cu_seqlens is not None:
        last, has_token = last_positions(cu_seqlens)
        targets = targets.index_fill(1, last[has_token], IGNORE_INDEX)
    return targets


def _kept(hidden: Tensor, logits_to_keep: int | Tensor | None) -> Tensor:
    """Return the positions that get logits."""
    if isinstance(logits_to_keep, Tensor):
        return hidden[:, logits_to_keep]
    return hidden[:, -logits_to_keep:] if logits_to_keep else hidden
