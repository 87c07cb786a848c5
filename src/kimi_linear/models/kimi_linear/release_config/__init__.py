"""The released model type's configuration to and from ours. No torch.

Written is a superset that Moonshot's own code, transformers, vLLM, SGLang, llama.cpp and mlx-lm each find their keys
in: the released keys with their 1-based layer lists, and transformers' 0-based `layer_types` and `mlp_layer_types`.
The type holds Kimi Delta Attention (equal heads and dims, softplus gate) and latent attention without positions, with
dense layers first and experts after them.

Read are the released keys and the spellings in circulation. Kimi-K3's text tower carries the same model type and
other mathematics: its fields are refused by name, never ignored, and so are two spellings that disagree.
"""

from kimi_linear.models.kimi_linear.release_config.names import unknown_keys
from kimi_linear.models.kimi_linear.release_config.read import from_release_config
from kimi_linear.models.kimi_linear.release_config.write import to_release_config

__all__ = ["from_release_config", "to_release_config", "unknown_keys"]
