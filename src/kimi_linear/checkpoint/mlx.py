"""Export to mlx-lm's layout: experts stacked, the latent up-projection in two, convolutions with channels last."""

import os

import torch

from kimi_linear.base.errors import CheckpointError
from kimi_linear.checkpoint.relayout import write_layout
from kimi_linear.checkpoint.source import open_source
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.models.kimi_linear.dialects import MLX
from kimi_linear.models.kimi_linear.release_config import to_release_config


def export_mlx(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    show_progress: bool = False,
) -> None:
    """Write a checkpoint that `mlx_lm.load` reads without rearranging it.

    mlx-lm takes the model's epsilon for the latent norm, where the release has 1e-6, and does not renormalise the
    weight of a single chosen expert.

    Args:
        source: A directory in any layout, a hub name in the local cache, or a GGUF file.
        directory: Where to write; it must not exist.
        dtype: Of the weights; default: as stored. Decays stay float32, and router biases as they are.
        max_shard_size: Bytes of tensors in one file.
        show_progress: Draw a bar of bytes on a terminal.

    Raises:
        CheckpointError: The source is damaged or of a model that mlx-lm's type cannot hold, or the directory exists or
            cannot be written.
        DtypeError: Not a dtype of weights.

    Cost: reads and writes every byte once; memory for one tensor of the release.

    Example:
        >>> from kimi_linear import KimiLinearForCausalLM, load_model, preset
        >>> KimiLinearForCausalLM(preset("tiny")).save_pretrained("tiny")
        >>> export_mlx("tiny", "tiny-mlx")
        >>> load_model("tiny-mlx").config == preset("tiny")
        True
    """
    found = open_source(source)
    _check_mlx(found.config)
    write_layout(found, MLX, directory, dtype, max_shard_size, show_progress)


def _check_mlx(config: KimiLinearConfig) -> None:
    if not to_release_config(config)["linear_attn_config"]["kda_layers"]:
        raise CheckpointError(
            "mlx-lm's kimi_linear cannot hold this model: it has no layer with Kimi Delta Attention, and that type "
            "expects some; export another format."
        )
