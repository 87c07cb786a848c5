"""Write a checkpoint in another format, by the format's name."""

import os
from collections.abc import Callable
from pathlib import Path

from kimi_linear.base.errors import ConfigError
from kimi_linear.base.registry import unknown_name
from kimi_linear.checkpoint.gguf.export import TYPES, export_gguf
from kimi_linear.checkpoint.mlx import export_mlx
from kimi_linear.checkpoint.relayout import export_release

# Layouts of safetensors; GGUF is a file of its own kind.
_LAYOUTS: dict[str, Callable[..., None]] = {"release": export_release, "mlx": export_mlx}
_DTYPES = {"f32": "float32", "bf16": "bfloat16"}


def export(
    source: str | os.PathLike[str], target: str | os.PathLike[str], format: str = "gguf", type: str | None = None
) -> list[str]:
    """Write a checkpoint as a GGUF file, or in mlx-lm's or the released layout; return what to tell the user.

    Args:
        source: A directory in any layout, a hub name in the local cache, or a GGUF file.
        target: The file or the directory to write.
        format: "gguf", "mlx" or "release".
        type: Of the matrices: "f32" or "bf16", and for GGUF "q8_0" or "q4_0"; default: "bf16" for GGUF, else as stored.

    Raises:
        ConfigError: No such format or type, or a model that llama.cpp cannot run.
        CheckpointError: The source cannot be read, or the target not written.

    Example:
        >>> from kimi_linear import KimiLinearForCausalLM, preset
        >>> KimiLinearForCausalLM(preset("tiny")).save_pretrained("tiny")
        >>> len(export("tiny", "tiny-mlx", "mlx", "bf16"))
        1
    """
    if format == "gguf":
        # An unknown type is refused there.
        return _export_gguf(source, target, type or "bf16")
    if format not in _LAYOUTS:
        raise ConfigError(unknown_name("format", format, ["gguf", *_LAYOUTS]))
    if type is not None and type not in _DTYPES:
        raise ConfigError(f"type is {type!r}, expected f32 or bf16; only the format gguf has {', '.join(TYPES)}.")
    _LAYOUTS[format](source, target, dtype=None if type is None else _DTYPES[type], show_progress=True)
    files = [file for file in Path(target).expanduser().iterdir() if file.suffix == ".safetensors"]
    return [f"{target}: {sum(file.stat().st_size for file in files):,} bytes in {len(files)} files of tensors"]


def _export_gguf(source: str | os.PathLike[str], target: str | os.PathLike[str], type: str) -> list[str]:
    done = export_gguf(source, target, type, show_progress=True)  # type: ignore[arg-type]
    lines = [f"{done.path}: {done.nbytes:,} bytes, {done.tensors} tensors, {type}"]
    if done.widened:
        lines.append(
            f"{len(done.widened)} matrices have rows of no whole blocks and stay f32, such as {done.widened[0]}"
        )
    if not done.has_tokenizer:
        lines.append("there is no tokenizer.json: the vocabulary is made up, prompts are token ids")
    return lines
