"""mlx-lm computes what we compute, from the released layout and from our export to its own.

mlx-lm takes the model's epsilon for the latent norm, and leaves the weight of a single chosen expert as it is; our
model is built with both.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kimi_linear.causal_lm import KimiLinearForCausalLM
from kimi_linear.checkpoint.mlx import export_mlx
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.nn.ffn import MoEConfig
from support.awkward import AWKWARD, lively_model, prompt, with_latent_norm_eps
from support.engines import STEPS, computing_as, greedy_text, with_parts

mx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'kimi-linear[peers]'")
tree = pytest.importorskip("mlx.utils", reason="mlx is not installed: pip install 'kimi-linear[peers]'")
utils = pytest.importorskip("mlx_lm.utils", reason="mlx_lm is not installed: pip install 'kimi-linear[peers]'")


@pytest.fixture(scope="module", autouse=True)
def _interpreted() -> Any:
    """Kernels of a toy model take longer to compile than to run."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def as_mlx(config: KimiLinearConfig) -> KimiLinearConfig:
    top = {block.ffn.top_k for block in config.layer_blocks if isinstance(block.ffn, MoEConfig)}
    config = with_parts(config, MoEConfig, renormalize=False) if top == {1} else config
    return with_latent_norm_eps(config, config.norm_eps)


def logits_of(directory: Path, ids: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """mlx-lm's logits of a prompt read at once and of tokens one by one, computed in float32 on the CPU."""
    with mx.stream(mx.cpu):
        model, _ = utils.load_model(directory)
        model.set_dtype(mx.float32)
        cache = model.make_cache()
        rows = [
            np.array(model(mx.array(given), cache=cache))[0]
            for given in (ids.numpy(), *np.array(tokens)[:, None, None])
        ]
    return torch.from_numpy(np.concatenate(rows))


@pytest.fixture
def saved(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[KimiLinearForCausalLM, Path, Path]:
    """A model, and its directories in the released layout and in mlx-lm's."""
    stored = lively_model(request.param)
    stored.save_pretrained(tmp_path / "release")
    export_mlx(tmp_path / "release", tmp_path / "mlx")
    return stored, tmp_path / "release", tmp_path / "mlx"


@pytest.mark.parametrize("saved", AWKWARD, indirect=True)
def test_mlx_lm_makes_of_the_release_what_we_export(saved: tuple[KimiLinearForCausalLM, Path, Path]) -> None:
    _, release, exported = saved
    theirs, ours = (dict(tree.tree_flatten(utils.load_model(path)[0].parameters())) for path in (release, exported))
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype, name
        assert bool(mx.array_equal(tensor, ours[name])), name


@pytest.mark.parametrize("saved", AWKWARD, indirect=True)
def test_prefill_and_decode_agree(saved: tuple[KimiLinearForCausalLM, Path, Path]) -> None:
    stored, _, exported = saved
    ids = prompt_of(stored)
    tokens, ours = greedy_text(computing_as(as_mlx(stored.config), stored), ids)
    theirs = logits_of(exported, ids, tokens[:STEPS])
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().max() < 1e-4 * ours.abs().max()
    assert torch.equal(theirs.argmax(-1), ours.argmax(-1))


def prompt_of(model: KimiLinearForCausalLM) -> torch.Tensor:
    return prompt(next(name for name, config in AWKWARD.items() if config == model.config))
