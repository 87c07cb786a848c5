"""Our logits are those of transformers' own kimi_linear, from the directory that `save_pretrained` writes."""

import dataclasses

import pytest
import torch

from kimi_linear.causal_lm import KimiLinearForCausalLM
from kimi_linear.models.kimi_linear.presets import preset
from kimi_linear.nn.config import BlockConfig
from kimi_linear.nn.ffn import MoEConfig
from support.awkward import AWKWARD, lively_model, prompt
from support.transformers import ABSENT, ROPE_WARNING, load_in_transformers, relative_gap

pytest.importorskip("transformers", reason=ABSENT)
pytestmark = pytest.mark.filterwarnings(ROPE_WARNING)

LIMIT = 1e-4
STEPS = 32


def routers(config):
    return {block.ffn.activation for block in config.layer_blocks if isinstance(block.ffn, MoEConfig)}


# transformers routes by sigmoid whatever the configuration says.
SHAPES = [name for name, config in AWKWARD.items() if routers(config) == {"sigmoid"}]


def pair(directory):
    """Both networks in float32, from one directory."""
    theirs, info = load_in_transformers(directory)
    assert not any(info.values()), info
    return KimiLinearForCausalLM.from_pretrained(directory, dtype=torch.float32), theirs


def assert_the_same(ours, theirs, ids):
    """A prompt, then one token at a time, with a cache on both sides; and all at once."""
    start = ids.shape[1] - STEPS
    cache = ours.new_cache(1)
    with torch.no_grad():
        mine, other = [ours(ids[:, :start], cache=cache).logits], theirs(ids[:, :start], use_cache=True)
        logits = [other.logits]
        for t in range(start, ids.shape[1]):
            mine.append(ours(ids[:, t : t + 1], cache=cache).logits)
            logits.append(theirs(ids[:, t : t + 1], past_key_values=other.past_key_values).logits)
        whole = ours(ids).logits
    stepped = torch.cat(logits, dim=1)
    assert relative_gap(whole, stepped) < LIMIT
    assert relative_gap(torch.cat(mine, dim=1), stepped) < LIMIT


def test_six_shapes_are_held_against_transformers():
    assert len(SHAPES) >= 6


@pytest.mark.parametrize("name", SHAPES)
def test_a_prompt_and_32_decode_steps_agree(name, tmp_path):
    lively_model(name).save_pretrained(tmp_path / "m")
    assert_the_same(*pair(tmp_path / "m"), prompt(name, 19 + STEPS))


@pytest.mark.parametrize("name", SHAPES)
def test_a_left_padded_batch_agrees(name, tmp_path):
    lively_model(name).save_pretrained(tmp_path / "m")
    ours, theirs = pair(tmp_path / "m")
    ids = torch.cat([prompt(name, 14), prompt(name, 15)[:, 1:]])
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad():
        mine, other = (model(ids, attention_mask=mask).logits for model in (ours, theirs))
    real = mask.bool()
    assert relative_gap(mine[real], other[real]) < LIMIT


@pytest.mark.parametrize("letters", ["all latent, all dense", "all dense", "all latent"])
def test_models_without_one_of_the_kinds_agree(letters, tmp_path):
    tiny = preset("tiny")
    names = {"all latent, all dense": "dd", "all dense": "kd", "all latent": "mm"}[letters]
    dense, mla = tiny.blocks["kda_dense"], tiny.blocks["mla"]
    of = {"k": dense, "d": BlockConfig(mixer=mla.mixer, ffn=dense.ffn), "m": mla}
    config = dataclasses.replace(tiny, blocks={n: of[n] for n in set(names)}, layers=tuple(names))
    KimiLinearForCausalLM(config, generator=torch.Generator().manual_seed(0)).save_pretrained(tmp_path / "m")
    ours, theirs = pair(tmp_path / "m")
    assert_the_same(ours, theirs, torch.arange(3, 3 + 5 + STEPS)[None])
    theirs.save_pretrained(tmp_path / "t")
    again = KimiLinearForCausalLM.from_pretrained(tmp_path / "t")
    assert again.config.layer_blocks == config.layer_blocks
