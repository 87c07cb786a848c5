"""Does a checkpoint fit a model, and a module its configuration? By every name, shape and dtype, before any tensor."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kimi_linear.base.errors import CheckpointError, list_names, shown
from kimi_linear.checkpoint.header import StoredTensor
from kimi_linear.checkpoint.reader import open_shard
from kimi_linear.checkpoint.writer import DTYPE_NAMES
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.models.kimi_linear.dialects import Move, locate
from kimi_linear.models.kimi_linear.state_dict import to_release

_ROUTER_BIAS = "e_score_correction_bias"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def release_views(state: Mapping[str, Tensor], config: KimiLinearConfig) -> dict[str, Tensor]:
    """Return a module's tensors by release name, as views to read or to fill; nothing is copied.

    Raises:
        CheckpointError: The module lacks a tensor of its configuration, or has one that no checkpoint holds.
    """
    unknown = state.keys() - config.shapes().keys()
    if unknown:
        raise CheckpointError(
            f"the model has tensors that its configuration does not ({list_names(unknown)}); "
            "save the plain model, without wrappers or adapters."
        )
    return to_release(state, config)


def narrow_router_biases(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors with each router bias in `dtype`, as the release has it, where that loses nothing.

    A bias that training has moved by less than a step of `dtype` stays in float32: rounding it would change routing.
    """
    narrowed = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith(_ROUTER_BIAS) and torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            narrowed[name] = tensor.to(dtype)
    return narrowed


def with_tied_head(tensors: Mapping[str, Tensor], config: KimiLinearConfig) -> dict[str, Tensor]:
    """Return the tensors with the output head that tied embeddings are, for engines that do not tie them by themselves.

    transformers' model of the released type reads a head in any case, and draws one where the checkpoint has none.
    """
    return {**tensors, HEAD: tensors[EMBEDDING]} if config.tie_embeddings else dict(tensors)


def check_fits(stored: Mapping[str, StoredTensor], config: KimiLinearConfig, directory: Path) -> list[Move]:
    """Check a checkpoint, in the release's layout or another one, against its configuration; return what goes where.

    Raises:
        CheckpointError: Tensors are missing, unexpected, of another shape or not floating; lists the first ten each.
    """
    known = {name: tensor for name, tensor in stored.items() if not may_be_skipped(name)}
    if config.tie_embeddings and EMBEDDING in known and HEAD in known:
        _check_tied(known[EMBEDDING], known.pop(HEAD), directory)
    moves, missing = locate({name: tensor.shape for name, tensor in known.items()}, config)
    expected = {move.stored: move.shape for move in moves}
    shapes = [
        f"{name} {shown(list(known[name].shape))} instead of {list(shape)}"
        for name, shape in expected.items()
        if not _shape_fits(known[name].shape, shape)
    ]
    dtypes = [f"{name} {known[name].dtype}" for name in expected if known[name].dtype not in DTYPE_NAMES.values()]
    problems = {
        "missing": [*missing, *_incomplete(moves)],
        "stored twice, in different layouts": _repeated(moves),
        "unexpected": known.keys() - expected.keys(),
        "of another shape": shapes,
        f"of a dtype other than {', '.join(DTYPE_NAMES.values())}": dtypes,
    }
    found = [f"{len(names)} {what} ({list_names(names)})" for what, names in problems.items() if names]
    if found:
        raise CheckpointError(
            f"{directory}: the tensors do not fit config.json: {'; '.join(found)}; "
            "check that it is complete and of this model."
        )
    return moves


def _repeated(moves: Sequence[Move]) -> list[str]:
    """Return the release tensors that several stored tensors claim to be."""
    whole = Counter((move.release, move.rows and move.rows.start) for move in moves)
    return [release for (release, _), count in whole.items() if count > 1]


def _incomplete(moves: Sequence[Move]) -> list[str]:
    """Return the release tensors of which only some rows are stored."""
    rows = Counter(move.release for move in moves if move.rows is not None)
    return [f"a part of {name}" for name, count in rows.items() if count != 2]


def _check_tied(embedding: StoredTensor, head: StoredTensor, directory: Path) -> None:
    with open_shard(embedding.file) as file, open_shard(head.file) as other:
        same = embedding.dtype == head.dtype and torch.equal(file.get_tensor(EMBEDDING), other.get_tensor(HEAD))
    if not same:
        raise CheckpointError(
            f"{directory}: config.json says tie_word_embeddings, and {HEAD} is not {EMBEDDING}; set "
            "tie_word_embeddings to false there if the head was trained on its own."
        )


def may_be_skipped(name: str) -> bool:
    """Return whether a name is one that other tools add and that this network has no use for."""
    return name.endswith(".rotary_emb.inv_freq") or name.startswith("model.mtp.")


def _shape_fits(given: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    # Both spellings of A_log ([1, 1, H, 1] and [H]) and of convolution weights ([D, 1, W] and [D, W]) are in use.
    without_ones = tuple(size for size in expected if size != 1)
    return given == expected or (len(expected) > 2 and given == without_ones)


def piece_of_stored(tensor: Tensor, move: Move) -> Tensor:
    """Return a stored tensor's piece, a view in the axes of the release."""
    # Axes of size 1 come and go between layouts, so an index counts in the shape that the move names.
    piece = tensor.reshape(move.shape)[move.take]
    return piece.transpose(-1, -2) if move.swap else piece


def part_of_release(tensor: Tensor, move: Move) -> Tensor:
    """Return the part of a release tensor that a stored piece is, a view."""
    return tensor if move.rows is None else tensor.view(move.groups, -1, *tensor.shape[1:])[:, move.rows]


def join_pieces(shape: tuple[int, ...], moves: list[Move], stored: Callable[[str], Tensor]) -> Tensor:
    """Return a release tensor from the stored tensors that hold it, each asked for by name."""
    pieces = [(move, piece_of_stored(stored(move.stored), move)) for move in moves]
    if moves[0].rows is None:
        return pieces[0][1].reshape(shape)
    tensor = torch.empty(shape, dtype=pieces[0][1].dtype)
    for move, piece in pieces:
        part_of_release(tensor, move).copy_(piece)
    return tensor
