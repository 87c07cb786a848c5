"""Write a GGUF file piece by piece from the mapped checkpoint; no model is built, no tensor is held whole."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kimi_linear.base.errors import CheckpointError, ConfigError
from kimi_linear.base.files import atomic_file
from kimi_linear.base.registry import unknown_name
from kimi_linear.checkpoint.gguf.metadata import ARCHITECTURE, to_metadata
from kimi_linear.checkpoint.gguf.names import DECAY, gguf_moves, is_matrix
from kimi_linear.checkpoint.gguf.read import load_gguf_package
from kimi_linear.checkpoint.gguf.vocabulary import Vocabulary, made_up, read_vocabulary
from kimi_linear.checkpoint.relayout import stored_piece
from kimi_linear.checkpoint.source import Source, open_source
from kimi_linear.checkpoint.writer import as_bytes, explain_write_errors
from kimi_linear.models.kimi_linear.dialects import Move

GGUFType = Literal["f32", "bf16", "q8_0", "q4_0"]
# By our names: the names of the package gguf for the type of a tensor, and of a file.
TYPES = {
    "f32": ("F32", "ALL_F32"),
    "bf16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
    "q4_0": ("Q4_0", "MOSTLY_Q4_0"),
}
# Numbers converted at a time.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class ExportedGGUF:
    """What was written; `widened` are the matrices whose rows are no whole blocks, so that they stayed float32."""

    path: Path
    nbytes: int
    tensors: int
    widened: tuple[str, ...]
    has_tokenizer: bool


@dataclass(frozen=True)
class _Plan:
    """One tensor of the file: its pieces, and the package's type and the bytes it gets."""

    name: str
    pieces: tuple[Move, ...]
    kind: Any
    nbytes: int


def export_gguf(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    dtype: GGUFType = "bf16",
    *,
    show_progress: bool = False,
) -> ExportedGGUF:
    """Write a checkpoint as a GGUF file that llama.cpp runs.

    Matrices, the output head too, get the type; vectors, convolutions and routers are float32, and so is a matrix
    whose rows are no whole number of blocks. llama.cpp takes the model's epsilon for the latent norm, where the release
    has 1e-6. The tokenizer comes from the tokenizer.json beside the checkpoint, the template from chat_template.jinja;
    without a tokenizer the vocabulary is made up, and prompts are token ids.

    Args:
        source: A directory in any layout, a hub name in the local cache, or a GGUF file.
        path: The file to write, whole or not at all; an existing file is replaced.
        dtype: "f32", "bf16", "q8_0" (8.5 bits a weight) or "q4_0" (4.5 bits).
        show_progress: Draw a bar of bytes on a terminal.

    Raises:
        CheckpointError: The source is damaged or of another model, its tokenizer has no place in GGUF, the file cannot
            be written, or the package gguf is missing.
        ConfigError: Not such a type, or a model that llama.cpp cannot run; says why.

    Cost: reads every byte once; memory for one tensor of the release and for 4 million numbers in float32.

    Example:
        >>> from kimi_linear import KimiLinearForCausalLM, load_model, preset
        >>> KimiLinearForCausalLM(preset("tiny")).save_pretrained("tiny")
        >>> export_gguf("tiny", "tiny.gguf", "q8_0").tensors
        89
        >>> load_model("tiny.gguf").config.layers == preset("tiny").layers
        True
    """
    if dtype not in TYPES:
        raise ConfigError(unknown_name("GGUF type", dtype, list(TYPES)))
    gguf = load_gguf_package()
    found, target = open_source(source), Path(path).expanduser().resolve()
    if target.is_dir():
        raise CheckpointError(f"cannot write {target}: it is a directory; give the name of a .gguf file.")
    metadata = to_metadata(found.config)
    directory = found.path if found.path.is_dir() else None
    vocabulary = None if directory is None else read_vocabulary(directory, found.config.vocab_size)
    plans = list(_plan(found, getattr(gguf.GGMLQuantizationType, TYPES[dtype][0]), gguf))
    with explain_write_errors(target), atomic_file(target) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        writer.add_name(found.path.name)
        writer.add_file_type(getattr(gguf.LlamaFileType, TYPES[dtype][1]))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_metadata(writer, gguf, metadata)
        _add_vocabulary(writer, vocabulary or made_up(found.config.vocab_size), found, directory)
        _write_header(writer, plans)
        total = sum(plan.nbytes for plan in plans)
        bar = tqdm(total=total, unit="B", unit_scale=True, desc=target.name, disable=None if show_progress else True)
        with bar, temporary.open("ab") as file:
            for plan in plans:
                for block in _blocks(plan, found, gguf):
                    file.write(block)
                    bar.update(len(block))
                file.write(bytes(-file.tell() % writer.data_alignment))
    wide = gguf.GGMLQuantizationType.F32
    matrices = [plan for plan in plans if is_matrix(plan.name, plan.pieces[0].shape)]
    widened = tuple(plan.name for plan in matrices if dtype != "f32" and plan.kind == wide)
    return ExportedGGUF(target, target.stat().st_size, len(plans), widened, vocabulary is not None)


def _write_header(writer: Any, plans: Sequence[_Plan]) -> None:
    """Write everything in front of the tensors, aligned, and close the file; they are appended to it."""
    for plan in plans:
        writer.add_tensor_info(plan.name, plan.pieces[0].shape, np.dtype(np.float32), plan.nbytes, plan.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_padding(writer.fout[0], writer.fout[0].tell())
    writer.close()


def _plan(source: Source, wanted: Any, gguf: Any) -> Iterator[_Plan]:
    moves: dict[str, list[Move]] = {}
    for move in gguf_moves(source.config):
        moves.setdefault(move.stored, []).append(move)
    for name, pieces in moves.items():
        shape = pieces[0].shape
        fits = is_matrix(name, shape) and shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0
        kind = wanted if fits else gguf.GGMLQuantizationType.F32
        block, itemsize = gguf.GGML_QUANT_SIZES[kind]
        yield _Plan(name, tuple(pieces), kind, math.prod(shape) // block * itemsize)


def _blocks(plan: _Plan, source: Source, gguf: Any) -> Iterator[memoryview]:
    """Yield the bytes of a tensor, some rows at a time."""
    for move in plan.pieces:
        piece = stored_piece(source.read(move.release), move)
        if plan.name.endswith(DECAY):
            piece = -piece.double().exp()
        rows = piece.reshape(-1, plan.pieces[0].shape[-1])
        for part in rows.split(max(1, _CHUNK // rows.shape[1])):
            yield _converted(part, plan.kind, gguf)


def _converted(rows: Tensor, kind: Any, gguf: Any) -> memoryview:
    if kind == gguf.GGMLQuantizationType.BF16:
        return as_bytes(rows.to(torch.bfloat16))
    if kind == gguf.GGMLQuantizationType.F32:
        return as_bytes(rows.float())
    with np.errstate(divide="ignore"):
        # A block of zeros divides by its scale.
        return memoryview(gguf.quants.quantize(rows.float().contiguous().numpy(), kind).reshape(-1))


def _add_metadata(writer: Any, gguf: Any, metadata: dict[str, Any]) -> None:
    kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, kinds[type(value)])


def _add_vocabulary(writer: Any, vocabulary: Vocabulary, source: Source, directory: Path | None) -> None:
    config = source.config
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_add_bos_token(False)
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    if config.pad_token_id is not None:
        writer.add_pad_token_id(config.pad_token_id)
    add_end = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, token in zip(add_end, _end_tokens(source), strict=False):
        add(token)
    template = None if directory is None else directory / "chat_template.jinja"
    if template is not None and template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))


def _end_tokens(source: Source) -> Sequence[int]:
    """Return the tokens that end a text, the configuration's own first; GGUF has room for three."""
    own = source.config.eos_token_id
    return [*([] if own is None else [own]), *(token for token in source.end_token_ids if token != own)]
