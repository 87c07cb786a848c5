"""The inputs of an operator case as files, which the peers' environment can read too."""

from pathlib import Path

import numpy as np
import torch

from kimi_linear.recipes.bench.cases import Case, make_inputs


def write_inputs(case: Case, folder: Path) -> None:
    """Write the inputs of a case, and the gradient of its output, as .npy files."""
    generator = torch.Generator().manual_seed(1)
    arrays = {**make_inputs(case), "d_o": torch.randn(case.B, case.T, case.H, case.V, generator=generator)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensor in arrays.items():
        np.save(folder / f"{name}.npy", tensor.numpy())
