"""Checks of the tensors by their headers: there once, under the release's names, in its shapes and dtypes."""

from collections import Counter
from collections.abc import Iterator

import torch

from kimi_linear.base.errors import CheckpointError, list_names
from kimi_linear.checkpoint.assemble import mapped_tensors
from kimi_linear.checkpoint.header import StoredTensor
from kimi_linear.checkpoint.layout import HEAD, check_fits, may_be_skipped
from kimi_linear.models.kimi_linear.dialects import MLX as MLX_LAYOUT
from kimi_linear.models.kimi_linear.dialects import RELEASE
from kimi_linear.models.kimi_linear.keys import release_tensors
from kimi_linear.recipes.checkup.evidence import Evidence
from kimi_linear.recipes.checkup.finding import ALL, LLAMA, MLX, SGLANG, TRANSFORMERS, VLLM, Finding

_DECAYS = ("A_log", "dt_bias")
_ROUTER_BIAS = "e_score_correction_bias"


def usable(evidence: Evidence) -> dict[str, StoredTensor]:
    """Return the tensors that the network has a use for, in whatever layout."""
    stored = evidence.stored
    return {move.stored: stored[move.stored] for move in evidence.moves}


def presence(evidence: Evidence) -> Iterator[Finding]:
    """Name missing, unfitting, superfluous and repeated tensors."""
    if evidence.config is None or not evidence.shards:
        return
    try:
        check_fits(usable(evidence), evidence.config, evidence.directory)
    except CheckpointError as error:
        yield Finding("tensors", "error", str(error), ALL, "download or save the checkpoint again")
    tied = {HEAD} if evidence.config is not None and evidence.config.tie_embeddings else set()
    unused = evidence.stored.keys() - {move.stored for move in evidence.moves} - tied
    if unused and evidence.moves:
        harmless = all(may_be_skipped(name) for name in unused)
        text = f"{len(unused)} tensors have no use in this network ({list_names(unused)})."
        affects = (LLAMA,) if harmless else ALL
        yield Finding("tensors", "warning" if harmless else "error", text, affects, "leave them out", fixable=True)
    same, different = compare_duplicates(evidence)
    if same:
        text = f"{len(same)} tensors are in several files ({list_names(same)}), with the same values."
        yield Finding("tensors", "warning", text, (VLLM, SGLANG, LLAMA), "keep one of each", fixable=True)
    if different:
        text = f"{len(different)} tensors are in several files with different values ({list_names(different)})."
        yield Finding("tensors", "error", text, ALL, "remove the wrong files")


def compare_duplicates(evidence: Evidence) -> tuple[list[str], list[str]]:
    """Return the tensors in several files that are the same everywhere, and those that are not; reads them."""
    same, different = list[str](), list[str]()
    for name, paths in evidence.duplicates.items():
        first, *others = (mapped_tensors({name: path})[name] for path in paths)
        equal = all(first.dtype == x.dtype and torch.equal(first, x) for x in others)
        (same if equal else different).append(name)
    return same, different


def layout(evidence: Evidence) -> Iterator[Finding]:
    """Name tensors in the layout or the shapes of another engine."""
    if evidence.config is None:
        return
    by_dialect: dict[str, set[str]] = {}
    for move in evidence.moves:
        by_dialect.setdefault(move.dialect, set()).add(move.stored)
    for dialect in sorted(by_dialect.keys() - {RELEASE}):
        names = by_dialect[dialect]
        text = f"{len(names)} tensors are in the layout of {dialect} ({list_names(names, 3)}), not in the release's."
        affects = (TRANSFORMERS, VLLM, SGLANG, LLAMA) if dialect == MLX_LAYOUT else (VLLM, SGLANG, LLAMA, MLX)
        yield Finding("layout", "error", text, affects, "save it in the release's layout", fixable=True)
    stored = evidence.stored
    shapes = release_tensors(evidence.config)
    flat = [
        move.stored
        for move in evidence.moves
        if move.dialect == RELEASE
        and stored[move.stored].shape != shapes[move.release][0]
        and stored[move.stored].shape == tuple(size for size in move.shape if size != 1)
    ]
    if flat:
        text = f"{len(flat)} tensors lack axes of size 1 ({list_names(flat, 3)}), {list(stored[flat[0]].shape)} first."
        yield Finding("layout", "error", text, (TRANSFORMERS,), "save it in the release's shapes", fixable=True)


def dtypes(evidence: Evidence) -> Iterator[Finding]:
    """Name decays below float32, router biases above the rest, and mixtures."""
    if evidence.config is None:
        return
    kinds: dict[str, str] = {name: tensor.dtype for name, tensor in usable(evidence).items()}
    rounded = [name for name in kinds if name.endswith(_DECAYS) and kinds[name] in ("BF16", "F16")]
    if rounded:
        text = (
            f"{len(rounded)} decay parameters are stored below float32 ({list_names(rounded, 2)}): they were rounded."
        )
        fix = "store what is left of them as float32, so that no engine rounds again"
        yield Finding("dtypes", "warning", text, ALL, fix, fixable=True)
    weights = Counter(dtype for name, dtype in kinds.items() if not name.endswith((*_DECAYS, _ROUTER_BIAS)))
    if len(weights) > 1:
        counts = ", ".join(f"{n} {dtype}" for dtype, n in weights.most_common())
        usual = weights.most_common(1)[0][0]
        other = [x for x in kinds if kinds[x] != usual and not x.endswith((*_DECAYS, _ROUTER_BIAS))]
        text = f"weights are stored in several dtypes: {counts}; not {usual}: {list_names(other)}."
        yield Finding("dtypes", "warning", text, ALL, "convert the model to one dtype")
    biases = [name for name in kinds if name.endswith(_ROUTER_BIAS) and kinds[name] not in weights]
    if biases:
        text = f"{len(biases)} router biases are {kinds[biases[0]]} among weights of {'/'.join(weights)}: {biases[0]}."
        fix = "store them as the weights, where that loses nothing"
        yield Finding("dtypes", "warning", text, (TRANSFORMERS,), fix, fixable=True)
