"""The cache that `generate` of transformers takes: pieces give the whole, whatever it does with the rows."""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'kimi-linear[peers]'")

from kimi_linear import KimiLinearForCausalLM, preset
from kimi_linear.base.errors import ConfigError, StateError
from kimi_linear.integrations.transformers import KimiLinearCache, KimiLinearHybridConfig, KimiLinearHybridForCausalLM
from support.awkward import lively_model

PROMPT = torch.randint(3, 131, (1, 11), generator=torch.Generator().manual_seed(5))
GREEDY = {"do_sample": False, "eos_token_id": None}


def wrapped(plain: KimiLinearForCausalLM) -> KimiLinearHybridForCausalLM:
    return KimiLinearHybridForCausalLM(KimiLinearHybridConfig(plain.config), plain).eval()


def models() -> tuple[KimiLinearForCausalLM, KimiLinearHybridForCausalLM]:
    plain = lively_model("odd-heads")
    return plain, wrapped(plain)


@pytest.mark.parametrize("cut", range(1, 11))
def test_a_prompt_cut_anywhere_gives_the_logits_of_the_whole(cut: int) -> None:
    _, model = models()
    cache = KimiLinearCache()
    with torch.no_grad():
        whole = model(PROMPT).logits
        first = model(PROMPT[:, :cut], past_key_values=cache).logits
        second = model(PROMPT[:, cut:], past_key_values=cache).logits
    assert cache.get_seq_length() == 11
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation_is_our_own(use_cache: bool) -> None:
    plain, model = models()
    expected = plain.generate(PROMPT, max_new_tokens=12, temperature=0.0, stop_token_ids=())
    assert torch.equal(model.generate(PROMPT, max_new_tokens=12, use_cache=use_cache, **GREEDY), expected)


def test_a_left_padded_batch_generates_what_its_rows_generate_alone() -> None:
    _, model = models()
    rows = [PROMPT[0, :4], PROMPT[0], PROMPT[0, 3:10]]
    ids, mask = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, 11 - len(row) :], mask[index, 11 - len(row) :] = row, 1
    together = model.generate(ids, attention_mask=mask, max_new_tokens=6, **GREEDY)
    alone = [model.generate(row[None], max_new_tokens=6, **GREEDY)[0, -6:] for row in rows]
    assert torch.equal(together[:, -6:], torch.stack(alone))


def test_beam_search_with_a_cache_is_beam_search_without() -> None:
    _, model = models()
    options = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 8, **GREEDY}
    prompts = torch.cat([PROMPT, PROMPT.flip(1)])
    assert torch.equal(model.generate(prompts, **options), model.generate(prompts, use_cache=False, **options))


def test_beams_move_between_rows() -> None:
    """Otherwise the test above would pass with a cache whose rows stay where they are."""
    _, model = models()
    moved = []

    class Spy(KimiLinearCache):
        def reorder_cache(self, beam_idx: torch.Tensor) -> None:
            moved.append(not torch.equal(beam_idx, torch.arange(len(beam_idx))))
            super().reorder_cache(beam_idx)

    model.generate(PROMPT, past_key_values=Spy(), num_beams=4, max_new_tokens=8, **GREEDY)
    assert any(moved)


def test_sampled_rows_with_one_seed_are_the_same_with_and_without_a_cache() -> None:
    _, model = models()
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 6, "eos_token_id": None}
        drawn.append(model.generate(PROMPT, use_cache=use_cache, **options))
    assert torch.equal(*drawn)
    assert len(drawn[0].unique(dim=0)) > 1


def test_a_chat_goes_on_from_the_cache_of_the_turn_before() -> None:
    _, model = models()
    cache = KimiLinearCache()
    first = model.generate(PROMPT, past_key_values=cache, max_new_tokens=5, **GREEDY)
    assert cache.get_seq_length() == 11 + 5 - 1
    turn = torch.cat([first, PROMPT[:, :3]], dim=1)
    again = model.generate(turn, past_key_values=cache, max_new_tokens=5, **GREEDY)
    assert torch.equal(again, model.generate(turn, max_new_tokens=5, **GREEDY))


def test_a_copy_of_a_cache_serves_several_continuations() -> None:
    _, model = models()
    with torch.no_grad():
        prefix = model(PROMPT[:, :6]).past_key_values
        assert isinstance(prefix, KimiLinearCache)
        first = model(PROMPT[:, 6:], past_key_values=copy.deepcopy(prefix)).logits
        second = model(PROMPT[:, 6:], past_key_values=copy.deepcopy(prefix)).logits
    assert prefix.get_seq_length() == 6
    assert torch.equal(first, second)


def test_prefill_in_chunks_changes_nothing() -> None:
    _, model = models()
    chunked = model.generate(PROMPT, max_new_tokens=6, prefill_chunk_size=4, **GREEDY)
    assert torch.equal(chunked, model.generate(PROMPT, max_new_tokens=6, **GREEDY))


def test_rows_are_repeated_and_selected() -> None:
    _, model = models()
    with torch.no_grad():
        cache = model(torch.cat([PROMPT, PROMPT.flip(1)])).past_key_values
        cache.batch_repeat_interleave(2)
        assert cache.batch_size == 4
        step = PROMPT[:, :1].expand(4, 1)
        logits = model(step, past_key_values=copy.deepcopy(cache)).logits
        cache.batch_select_indices(torch.tensor([2, 0]))
        chosen = model(step[:2], past_key_values=cache).logits
    torch.testing.assert_close(logits[0], logits[1])
    assert not torch.allclose(logits[1], logits[2])
    torch.testing.assert_close(chosen, logits[[2, 0]])


def test_a_model_of_other_mixers_keeps_its_states_too() -> None:
    plain = KimiLinearForCausalLM(preset("tiny-gdn"), generator=torch.Generator().manual_seed(1)).eval()
    expected = plain.generate(PROMPT, max_new_tokens=9, temperature=0.0, stop_token_ids=())
    assert torch.equal(wrapped(plain).generate(PROMPT, max_new_tokens=9, **GREEDY), expected)


def test_what_takes_tokens_back_is_refused() -> None:
    _, model = models()
    cache = KimiLinearCache()
    cache.crop(0)
    with pytest.raises(StateError, match="asked to take back 2 tokens"):
        cache.crop(-2)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        model.generate(PROMPT, max_new_tokens=4, prompt_lookup_num_tokens=2, **GREEDY)


def test_another_cache_is_refused() -> None:
    from transformers import DynamicCache

    _, model = models()
    with pytest.raises(StateError, match="past_key_values is a DynamicCache, expected a KimiLinearCache"):
        model(PROMPT, past_key_values=DynamicCache())
    with pytest.raises(ConfigError, match="cache_implementation is 'static'"):
        model.generate(PROMPT, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(StateError, match="given to a model of transformers"):
        KimiLinearCache().update(PROMPT, PROMPT, 0)
    with torch.no_grad():
        cache = model(PROMPT).past_key_values
        with pytest.raises(StateError, match="has 1 rows, the call has 2"):
            model(PROMPT.expand(2, -1), past_key_values=cache)


def test_a_reset_cache_begins_anew() -> None:
    _, model = models()
    with torch.no_grad():
        output = model(PROMPT)
        cache = output.past_key_values
        cache.reset()
        assert (cache.get_seq_length(), cache.batch_size, len(cache)) == (0, -1, 0)
        assert torch.equal(model(PROMPT, past_key_values=cache).logits, output.logits)
