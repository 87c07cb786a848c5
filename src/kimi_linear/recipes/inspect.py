"""What a checkpoint directory holds: its network, its tensors, the layout they are in, and what is odd about it."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from kimi_linear.base.errors import CheckpointError
from kimi_linear.checkpoint.layout import check_fits
from kimi_linear.checkpoint.reader import stored_tensors
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.models.kimi_linear.dialects import RELEASE
from kimi_linear.recipes.checkup import Finding, check, gather
from kimi_linear.recipes.checkup.finding import ALL

# One letter a layer for drawing; a small one has a dense feed-forward network.
_LETTERS = {"kda": "K", "mla": "M", "gqa": "G", "gdn": "D"}


@dataclass(frozen=True)
class Inspection:
    """What was found; `problem` is why the checkpoint would not load, or "", `odd` what else deserves a look."""

    directory: Path
    config: KimiLinearConfig
    model_type: str
    tensors: int
    bytes_by_dtype: dict[str, int]
    layouts: tuple[str, ...]
    problem: str
    odd: tuple[str, ...]

    @property
    def schedule(self) -> str:
        """A letter a layer: K, M, G, D for the mixers; small where the feed-forward network is dense."""
        letters = [_LETTERS.get(block.mixer.kind, "?") for block in self.config.layer_blocks]
        dense = [block.ffn.kind == "swiglu" for block in self.config.layer_blocks]
        text = "".join(x.lower() if small else x for x, small in zip(letters, dense, strict=True))
        return " ".join(text[start : start + 4] for start in range(0, len(text), 4))


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Look at a checkpoint's configuration and headers; no tensor is read unless two files hold it.

    Raises:
        CheckpointError: There is nothing to look at, or the configuration cannot be read.
    """
    evidence = gather(path)
    if evidence.config is None:
        raise CheckpointError(evidence.problem)
    problem = ""
    try:
        check_fits(stored_tensors(evidence.directory), evidence.config, evidence.directory)
    except CheckpointError as error:
        problem = str(error)
    stored = evidence.stored
    sizes: Counter[str] = Counter()
    for tensor in stored.values():
        sizes[tensor.dtype] += tensor.nbytes
    return Inspection(
        evidence.directory,
        evidence.config,
        str(evidence.given.get("model_type")),
        len(stored),
        dict(sizes.most_common()),
        tuple(sorted({move.dialect for move in evidence.moves}, key=lambda name: (name != RELEASE, name))),
        problem,
        tuple(_sentence(finding) for finding in check(evidence) if finding.severity != "ok"),
    )


def _sentence(finding: Finding) -> str:
    engines = "every engine" if finding.affects == ALL else ", ".join(finding.affects)
    return f"{finding.text} ({finding.severity} for {engines})"


def report(found: Inspection) -> list[str]:
    """Return the findings as lines for a terminal."""
    config = found.config
    total = sum(found.bytes_by_dtype.values())
    dtypes = ", ".join(f"{name} {size:,} B" for name, size in found.bytes_by_dtype.items())
    kinds = Counter(block.mixer.kind for block in config.layer_blocks)
    lines = [
        f"directory   {found.directory}",
        f"type        {found.model_type}",
        f"network     width {config.hidden_size:,}, {config.num_layers} layers, vocabulary {config.vocab_size:,}",
        f"layers      {found.schedule}",
        f"            {', '.join(f'{_LETTERS.get(k, k)} {k} x {n}' for k, n in kinds.items())}; small: no experts",
        f"parameters  {config.parameters():,}, {config.active_parameters():,} active a token",
        f"tensors     {found.tensors:,}, {total:,} bytes: {dtypes}",
        f"layout      {', '.join(found.layouts) or 'unknown'}",
        f"loads       {'no: ' + found.problem if found.problem else 'yes'}",
    ]
    return [*lines, *(f"odd         {sentence}" for sentence in found.odd)]
