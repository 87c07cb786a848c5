"""Our configuration as a transformers configuration: what config.json of a checkpoint says, and nothing else."""

import json
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from kimi_linear.base.errors import ConfigError
from kimi_linear.checkpoint.configs import OWN_TYPE, model_json, read_config
from kimi_linear.checkpoint.load import torch_dtype
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.nn.mixers import GQAConfig, MLAConfig

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What transformers puts into the contents of a config.json of our own type, and we have no use for.
_ADDED = ("architectures", "transformers_version", "_commit_hash")


class KimiLinearHybridConfig(PreTrainedConfig):
    """A `KimiLinearConfig` in the form that transformers, PEFT and TRL read.

    Sizes are read-only: they are those of `network`. The special tokens, `dtype` and `use_cache` may be set.

    Args:
        network: Our configuration; or give the contents of a config.json as further arguments.
        dtype: Of the weights, as "bfloat16" or torch.bfloat16.
        use_cache: Whether calls without gradients return a cache.
        **fields: The contents of a config.json, of our own type or of the released one.

    Raises:
        ConfigError: The contents are of another model, or contradict themselves; says what.

    Example:
        >>> from kimi_linear import preset
        >>> config = KimiLinearHybridConfig(preset("tiny-gdn"))
        >>> KimiLinearHybridConfig.from_dict(config.to_dict()) == config
        True
    """

    model_type = OWN_TYPE
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        network: KimiLinearConfig | None = None,
        *,
        dtype: str | torch.dtype | None = None,
        use_cache: bool = True,
        **fields: Any,
    ) -> None:
        outer = {key: fields.pop(key) for key in ("name_or_path", "attn_implementation") if key in fields}
        if network is None:
            given = {"model_type": self.model_type, **fields}
            network = read_config({key: value for key, value in given.items() if key not in _ADDED})
        elif fields:
            raise ConfigError(f"a network and {', '.join(fields)} were both given; change the network instead.")
        super().__init__(dtype=torch_dtype(dtype), architectures=["KimiLinearForCausalLM"], **outer)
        self._network = network
        self.use_cache = use_cache
        for name in _TOKENS:
            setattr(self, name, getattr(network, name))

    @property
    def network(self) -> KimiLinearConfig:
        """Our configuration, with the special tokens as they are set here."""
        return replace(self._network, **{name: getattr(self, name) for name in _TOKENS})

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self._network.vocab_size

    @property
    def hidden_size(self) -> int:
        """Model width."""
        return self._network.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers."""
        return self._network.num_layers

    @property
    def num_attention_heads(self) -> int:
        """Query heads of the first layer with softmax attention, or of the first layer if none has."""
        mixers = [block.mixer for block in self._network.layer_blocks]
        attention = [mixer for mixer in mixers if isinstance(mixer, (MLAConfig, GQAConfig))]
        heads: int = (attention or mixers)[0].to_dict()["num_heads"]
        return heads

    @property
    def max_position_embeddings(self) -> int:
        """Context length the model is meant for."""
        return self._network.max_length

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the embedding is the output head too."""
        return self._network.tie_embeddings

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of config.json as a checkpoint has them: of the released type if the model fits it."""
        return model_json(self.network, str(self.dtype or torch.get_default_dtype()).removeprefix("torch."))

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what `to_dict` does: nothing is left out for being a default."""
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return the text of config.json."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KimiLinearHybridConfig) and self.to_dict() == other.to_dict()
