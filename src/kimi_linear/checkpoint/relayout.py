"""Write a checkpoint in another layout of safetensors, piece by piece from the mapped files; no model is built."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from kimi_linear.base.errors import CheckpointError
from kimi_linear.base.files import atomic_directory
from kimi_linear.checkpoint.configs import CONFIG_NAME, GENERATION_NAME, fits_release, generation_json, model_json
from kimi_linear.checkpoint.layout import EMBEDDING, HEAD, part_of_release
from kimi_linear.checkpoint.load import torch_dtype
from kimi_linear.checkpoint.save import write_json
from kimi_linear.checkpoint.source import Source, open_source
from kimi_linear.checkpoint.writer import explain_write_errors, parse_size, write_tensors
from kimi_linear.models.kimi_linear.dialects import MLX, RELEASE, Move, moves_into

# What belongs to a model beside its tensors and its configuration.
_SIDE_FILES = (
    *("tokeniz*", "tiktoken.model", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.*", GENERATION_NAME, "LICENSE*", "README.md"),
)
_FLOAT32 = ("A_log", "dt_bias")


def export_release(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    show_progress: bool = False,
) -> None:
    """Write any checkpoint in the released layout: right names, experts one by one, a configuration for all engines.

    Args:
        source: A directory in any layout, a hub name in the local cache, or a GGUF file.
        directory: Where to write; it must not exist.
        dtype: Of the weights; default: as stored. Decays stay float32, and router biases as they are.
        max_shard_size: Bytes of tensors in one file.
        show_progress: Draw a bar of bytes on a terminal.

    Raises:
        CheckpointError: The source is damaged or of another model, or the directory exists or cannot be written.
        DtypeError: Not a dtype of weights.

    Cost: reads and writes every byte once; memory for one tensor.

    Example:
        >>> from kimi_linear import KimiLinearForCausalLM, load_model, preset
        >>> KimiLinearForCausalLM(preset("tiny")).save_pretrained("tiny")
        >>> export_release("tiny", "tiny-bf16", dtype="bfloat16")
        >>> load_model("tiny-bf16").lm_head.weight.dtype
        torch.bfloat16
    """
    write_layout(open_source(source), RELEASE, directory, dtype, max_shard_size, show_progress)


def write_layout(
    source: Source,
    layout: str,
    directory: str | os.PathLike[str],
    dtype: str | torch.dtype | None,
    max_shard_size: int | str,
    show_progress: bool,
) -> None:
    """Write a checkpoint in the release's or mlx-lm's layout; arguments as for `export_release`."""
    target = Path(directory).expanduser().resolve()
    wanted, limit = torch_dtype(dtype), parse_size(max_shard_size)
    if target.exists():
        raise CheckpointError(f"cannot export to {target}: it exists; give a directory that does not.")
    moves: dict[str, list[Move]] = {}
    for move in moves_into(layout, source.config):
        moves.setdefault(move.stored, []).append(move)
    if layout == RELEASE and source.config.tie_embeddings and fits_release(source.config):
        # transformers reads a head in any case, and draws one where there is none.
        moves[HEAD] = [replace(moves[EMBEDDING][0], stored=HEAD)]
    # Shapes and dtypes without memory.
    tensors = {
        name: torch.empty(pieces[0].shape, dtype=_dtype(source, pieces[0].release, wanted), device="meta")
        for name, pieces in moves.items()
    }
    total = sum(tensor.nbytes for tensor in tensors.values())
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=target.name, disable=None if show_progress else True)

    def pieces(name: str) -> Iterator[Tensor]:
        for move in moves[name]:
            piece = stored_piece(source.read(move.release), move).to(tensors[name].dtype)
            yield piece
            bar.update(piece.nbytes)

    with bar, explain_write_errors(target), atomic_directory(target) as temporary:
        _write_sides(source, temporary, tensors["model.embed_tokens.weight"].dtype)
        made_for = "mlx" if layout == MLX else "pt"
        write_tensors(temporary, tensors, limit, pieces=pieces, made_for=made_for)


def stored_piece(release: Tensor, move: Move) -> Tensor:
    """Return the piece of a stored tensor that a release tensor gives; the inverse of reading it."""
    part = part_of_release(release, move)
    return part.transpose(-1, -2) if move.swap else part


def _dtype(source: Source, release: str, wanted: torch.dtype | None) -> torch.dtype:
    if release.endswith(_FLOAT32):
        return torch.float32
    # Rounding a router's bias would change what it chooses.
    keeps = wanted is None or release.endswith("e_score_correction_bias")
    return source.dtypes[release] if keeps or wanted is None else wanted


def _write_sides(source: Source, directory: Path, dtype: torch.dtype) -> None:
    """Write the configuration, and carry along what lies beside the tensors."""
    write_json(directory / CONFIG_NAME, model_json(source.config, str(dtype).removeprefix("torch.")))
    write_json(directory / GENERATION_NAME, generation_json(source.config, source.end_token_ids))
    if source.path.is_dir():
        for file in sorted({file for pattern in _SIDE_FILES for file in source.path.glob(pattern) if file.is_file()}):
            shutil.copyfile(file, directory / file.name)
