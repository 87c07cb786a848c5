"""The short convolution cut over two and four processes equals one process: outputs, final states, every gradient."""

from pathlib import Path

import pytest
import torch

from support import context_parallel as support
from support import ranks


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_equal_one_process(size: int, tmp_path: Path) -> None:
    cuts = support.conv_cuts(size)
    shares = ranks.run(size, support.conv_work, tmp_path, size)
    wrong = {}
    for cut, *parts in zip(cuts, *shares, strict=True):
        found = support.joined(cut, parts)
        wrong |= support.differences(cut, found, support.one_process(cut, torch.float64))
        if not torch.equal(found["final_state"], support.one_process(cut)["final_state"]):
            wrong[f"{cut.name}: bits of final_state"] = 1.0
    assert wrong == {}
