"""Checks that read every tensor: numbers that are none, matrices of zeros, the same matrix twice."""

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kimi_linear.checkpoint.assemble import mapped_tensors
from kimi_linear.checkpoint.reader import list_names
from kimi_linear.recipes.checkup.evidence import Evidence
from kimi_linear.recipes.checkup.finding import ALL, Finding

# Numbers looked at together; bounds what is copied at a time.
_PIECE = 1 << 24
# An output head that is the embedding is stored twice for engines that never tie them.
_TIED = {"lm_head.weight", "model.embed_tokens.weight"}


def check_values(evidence: Evidence, progress: Callable[[int], None] = lambda _: None) -> list[Finding]:
    """Read the weights, one tensor at a time, and return what is wrong with the numbers.

    Args:
        evidence: Of the checkpoint.
        progress: Called with the bytes of each tensor that was read.
    """
    broken, zero = [], []
    digests: dict[bytes, list[str]] = {}
    for shard in evidence.shards:
        for name, tensor in mapped_tensors(dict.fromkeys(shard.tensors, shard.path)).items():
            finite, nonzero, digest = _look(tensor)
            # A vector of equal numbers is how norms and biases start.
            is_matrix = sum(size > 1 for size in tensor.shape) > 1
            if not finite:
                broken.append(name)
            elif is_matrix and not nonzero:
                zero.append(name)
            elif is_matrix:
                digests.setdefault(digest, []).append(name)
            progress(shard.tensors[name].nbytes)
    same = [sorted(set(names)) for names in digests.values() if len(set(names)) > 1 and set(names) != _TIED]
    found = list(_findings(broken, zero, same))
    return found or [Finding("values", "ok", "every number is finite, no matrix is zero or there twice")]


def total_bytes(evidence: Evidence) -> int:
    """Return the bytes that `check_values` reads."""
    return sum(tensor.nbytes for shard in evidence.shards for tensor in shard.tensors.values())


def _findings(broken: list[str], zero: list[str], same: list[list[str]]) -> Iterator[Finding]:
    if broken:
        text = f"{len(broken)} tensors hold NaN or infinity ({list_names(broken)})."
        yield Finding("values", "error", text, ALL, "download or train again")
    if zero:
        text = f"{len(zero)} matrices are all zero ({list_names(zero)})."
        yield Finding("values", "warning", text, ALL, "check how they were made")
    if same:
        text = f"{len(same)} matrices are there under several names ({', '.join(' = '.join(n[:3]) for n in same[:5])})."
        yield Finding("values", "warning", text, ALL, "check how they were made")


def _look(tensor: Tensor) -> tuple[bool, bool, bytes]:
    """Return whether all numbers are finite, whether any is not zero, and a digest of the bytes."""
    flat = tensor.contiguous().reshape(-1)
    finite, nonzero, digest = True, False, hashlib.blake2b(str(tensor.shape).encode(), digest_size=16)
    for piece in flat.split(_PIECE):
        finite = finite and bool(piece.isfinite().all())
        nonzero = nonzero or bool(piece.count_nonzero())
        digest.update(piece.view(torch.uint8).numpy().data)
    return finite, nonzero, digest.digest()
