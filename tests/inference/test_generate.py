import dataclasses

import pytest
import torch

from kimi_linear.base.errors import ConfigError, KimiLinearError, ShapeError, StateError
from kimi_linear.inference.generate import end_tokens, generate, stream
from kimi_linear.inference.params import SamplingParams
from kimi_linear.models.kimi_linear.model import KimiLinearLM
from kimi_linear.models.kimi_linear.presets import preset

PROMPTS = [[5, 9, 2], [7], list(range(40, 61)), [1, 1, 1, 1, 1]]
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12)
SAMPLED = SamplingParams(temperature=1.0, top_p=0.95, seed=3, max_new_tokens=12)


def build(name="tiny", **changes):
    # Wide weights and float64: the largest logit leads by far more than rounding.
    config = dataclasses.replace(preset(name), initializer_range=0.2, **changes)
    return KimiLinearLM(config, generator=torch.Generator().manual_seed(0)).double().eval()


@pytest.fixture(scope="module")
def model():
    return build()


class Bytes:
    """Token n is byte n."""

    def decode(self, ids, /):
        return bytes(ids).decode("utf-8", errors="replace")


def scripted(monkeypatch, model, ids):
    """Make the model's greedy choice the given tokens, one a step, for every row."""
    plan = iter(ids)
    forward = model.forward

    def wrapped(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = torch.zeros_like(output.logits)
        output.logits[..., next(plan)] = 1.0
        return output

    monkeypatch.setattr(model, "forward", wrapped)


@torch.no_grad()
def greedy_by_full_forwards(model, prompt, steps):
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("name", ["tiny", "tiny-gdn", "tiny-mla"])
def test_greedy_with_a_cache_is_the_argmax_of_full_forwards(name):
    model = build(name)
    for prompt in PROMPTS:
        expected = greedy_by_full_forwards(model, prompt, 12)
        assert generate(model, [prompt], GREEDY).ids == (expected,)


@pytest.mark.parametrize("params", [GREEDY, dataclasses.replace(GREEDY, repetition_penalty=1.5)])
def test_a_ragged_batch_is_each_prompt_alone(model, params):
    alone = [generate(model, [prompt], params).ids[0] for prompt in PROMPTS]
    assert list(generate(model, PROMPTS, params).ids) == alone


def test_left_and_right_padding_and_lists_are_the_same(model):
    longest = max(map(len, PROMPTS))
    # Padding of a token that would change everything if it were read.
    left = torch.tensor([[99] * (longest - len(row)) + row for row in PROMPTS])
    right = torch.tensor([row + [99] * (longest - len(row)) for row in PROMPTS])
    left_mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in PROMPTS])
    expected = generate(model, PROMPTS, SAMPLED)
    assert generate(model, left, SAMPLED, attention_mask=left_mask) == expected
    assert generate(model, right, SAMPLED, attention_mask=left_mask.flip(1)) == expected


@pytest.mark.parametrize("chunk", [1, 2, 5, 20, 21, 1000])
def test_chunked_prefill_is_the_whole(model, chunk):
    assert generate(model, PROMPTS, GREEDY, prefill_chunk=chunk) == generate(model, PROMPTS, GREEDY)


def test_chunked_prefill_never_forwards_more_than_its_chunk(model, monkeypatch):
    widths = []
    forward = model.forward

    def watched(input_ids, **kwargs):
        widths.append(input_ids.shape[1])
        assert kwargs["last_only"]
        return forward(input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", watched)
    generate(model, [list(range(11))], dataclasses.replace(GREEDY, max_new_tokens=3), prefill_chunk=4)
    assert widths == [4, 4, 3, 1, 1]


def test_streaming_is_generate_step_by_step_and_row_by_row(model):
    output = generate(model, PROMPTS, SAMPLED, tokenizer=Bytes())
    events = list(stream(model, PROMPTS, SAMPLED, tokenizer=Bytes()))
    assert [event.row for event in events] == [0, 1, 2, 3] * 12
    for row in range(4):
        mine = [event for event in events if event.row == row]
        assert tuple(event.token_id for event in mine) == output.ids[row]
        assert "".join(event.text for event in mine) == output.texts[row]
        assert [event.finish_reason for event in mine[:-1]] == [None] * 11
        assert mine[-1].finish_reason == output.finish_reasons[row] == "length"


def test_a_seed_gives_the_same_text_and_another_seed_another(model):
    first = generate(model, PROMPTS, SAMPLED)
    torch.manual_seed(123)
    assert generate(model, PROMPTS, SAMPLED) == first
    assert generate(model, PROMPTS, dataclasses.replace(SAMPLED, seed=4)) != first


def test_equal_prompts_in_one_batch_draw_differently(model):
    hot = dataclasses.replace(SAMPLED, temperature=3.0, top_p=1.0)
    assert len(set(generate(model, [[1, 2]] * 4, hot).ids)) == 4


def test_a_row_that_ends_does_not_change_the_others(model):
    hot = dataclasses.replace(SAMPLED, temperature=3.0, top_p=1.0)
    whole = generate(model, PROMPTS, hot)
    # The fourth token of row 1 ends it.
    stop = whole.ids[1][3]
    stopped = generate(model, PROMPTS, dataclasses.replace(hot, stop_token_ids=(stop,)))
    for row, ids in enumerate(whole.ids):
        end = ids.index(stop) + 1 if stop in ids else len(ids)
        assert stopped.ids[row] == ids[:end]
        assert stopped.finish_reasons[row] == ("stop" if stop in ids else "length")
    assert len(stopped.ids[1]) <= 4
    assert "length" in stopped.finish_reasons


def test_a_repetition_penalty_that_forbids_repeats_sees_prompt_and_new_tokens(model):
    # Shifting every logit below zero is not possible from outside, so the largest penalty stands in for a ban.
    params = dataclasses.replace(GREEDY, repetition_penalty=100.0, max_new_tokens=30)
    ids = generate(model, [PROMPTS[2], PROMPTS[0]], params).ids
    for row, prompt in zip(ids, (PROMPTS[2], PROMPTS[0]), strict=True):
        assert len(set(row)) == len(row)
        assert not set(row) & set(prompt)


def test_stop_ids_default_to_the_model_and_can_be_switched_off(monkeypatch):
    model = build(eos_token_id=66)
    scripted(monkeypatch, model, b"ABCD")
    output = generate(model, [[1]], GREEDY, tokenizer=Bytes())
    assert output.ids == ((65, 66),)
    assert output.texts == ("A",)
    assert output.finish_reasons == ("stop",)

    model = build(eos_token_id=66)
    scripted(monkeypatch, model, b"ABCD")
    never = dataclasses.replace(GREEDY, stop_token_ids=(), max_new_tokens=4)
    assert generate(model, [[1]], never).ids == (tuple(b"ABCD"),)


def test_end_tokens_of_the_released_vocabulary_are_all_three():
    assert end_tokens(preset("48b-a3b")) == (163585, 163586, 163593)
    assert end_tokens(dataclasses.replace(preset("tiny"), eos_token_id=7)) == (7,)
    assert end_tokens(preset("tiny")) == ()


def test_a_stop_string_may_span_tokens_and_is_not_emitted(monkeypatch):
    model = build()
    scripted(monkeypatch, model, "hé END more".encode())
    params = dataclasses.replace(GREEDY, stop=("never", " END"))
    events = list(stream(model, [[1]], params, tokenizer=Bytes()))
    assert [event.text for event in events] == ["h", "", "é", "", "", "", ""]
    assert bytes(event.token_id for event in events).decode() == "hé END"
    assert events[-1].finish_reason == "stop"


def test_text_held_back_comes_out_when_no_stop_string_follows(monkeypatch):
    model = build()
    scripted(monkeypatch, model, b"a EN")
    params = dataclasses.replace(GREEDY, stop=(" END",), max_new_tokens=4)
    output = generate(model, [[1]], params, tokenizer=Bytes())
    assert output.texts == ("a EN",)
    assert output.finish_reasons == ("length",)


def test_a_stop_string_in_the_prompt_does_not_count(monkeypatch):
    model = build()
    scripted(monkeypatch, model, b"ND ok")
    params = dataclasses.replace(GREEDY, stop=("END",), max_new_tokens=5)
    assert generate(model, [list(b"END E")], params, tokenizer=Bytes()).texts == ("ND ok",)


def test_pieces_are_whole_characters_and_an_unfinished_one_is_marked_at_the_end(monkeypatch):
    model = build()
    text = "€😀".encode()
    scripted(monkeypatch, model, text)
    params = dataclasses.replace(GREEDY, max_new_tokens=len(text) - 1)
    events = list(stream(model, [[1]], params, tokenizer=Bytes()))
    assert [event.text for event in events] == ["", "", "€", "", "", "\ufffd"]


def test_a_cache_is_continued_from(model):
    cache = model.new_cache(1)
    first = generate(model, [[5, 9, 2]], GREEDY, cache=cache)
    # The last new token has not been read yet: the next turn begins with it.
    assert cache.lengths.tolist() == [3 + 12 - 1]
    second = generate(model, [[first.ids[0][-1], 8, 8]], GREEDY, cache=cache)
    expected = generate(model, [[5, 9, 2, *first.ids[0], 8, 8]], GREEDY)
    assert second.ids == expected.ids


def test_a_shared_prefix_serves_several_rows(model):
    cache = model.new_cache(1)
    with torch.no_grad():
        model(torch.tensor([[5, 9, 2]]), cache=cache)
    endings = [[1], [2, 3]]
    output = generate(model, endings, GREEDY, cache=cache.select_rows(torch.tensor([0, 0])))
    assert output.ids == generate(model, [[5, 9, 2, *ending] for ending in endings], GREEDY).ids


def test_generation_ends_where_the_context_ends():
    model = build(max_length=8)
    output = generate(model, [[1, 2, 3], [1, 2, 3, 4, 5, 6, 7]], GREEDY)
    assert [len(ids) for ids in output.ids] == [5, 1]
    assert output.finish_reasons == ("length", "length")


@pytest.mark.parametrize("length", [8, 9])
def test_a_prompt_that_leaves_no_room_is_an_error(length):
    model = build(max_length=8)
    with pytest.raises(ConfigError, match=f"prompt 1 has {length} tokens, which leaves no room .* of 8"):
        generate(model, [[1], [1] * length], GREEDY)
    cache = model.new_cache(1)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3, 4, 5]]), cache=cache)
    with pytest.raises(ConfigError, match="3 tokens after 5 in the cache"):
        generate(model, [[1, 2, 3]], GREEDY, cache=cache)


def test_errors_come_at_the_call_and_not_at_the_first_token(model):
    with pytest.raises(ConfigError, match="need a tokenizer"):
        stream(model, [[1]], dataclasses.replace(GREEDY, stop=("x",)))
    with pytest.raises(ConfigError, match="prefill_chunk is 0"):
        stream(model, [[1]], GREEDY, prefill_chunk=0)
    with pytest.raises(StateError, match="cache has 2 rows, the prompts 1"):
        stream(model, [[1]], GREEDY, cache=model.new_cache(2))
    with pytest.raises(ShapeError, match="prompt 0 is empty"):
        stream(model, [[]], GREEDY)
    with pytest.raises(KimiLinearError, match="expected tokens from 0 to 255"):
        stream(model, [[256]], GREEDY)


def test_logits_that_are_not_finite_end_in_one_sentence():
    model = build()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(KimiLinearError, match="row 0 hold NaN"):
        generate(model, [[1]], GREEDY)


def test_no_gradient_is_recorded_and_the_mode_is_restored():
    model = build().train()
    before = [module.training for module in model.modules()]
    cache = model.new_cache(1)
    for _ in stream(model, [[1, 2]], GREEDY, cache=cache):
        assert [module.training for module in model.modules()] == before
    assert not any(tensor.requires_grad for layer in cache.layers for tensor in layer.tensors().values())
    # Generating counts no load for the router's bias.
    assert all(block.mlp.gate.expert_counts is None for block in model.model.layers[1:])


def test_a_stream_can_be_left_at_any_time(model):
    events = stream(model, PROMPTS, GREEDY)
    next(events)
    events.close()
    assert generate(model, PROMPTS[:1], GREEDY).ids[0] == greedy_by_full_forwards(model, PROMPTS[0], 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_runs_in_the_dtypes_people_use(dtype):
    model = build().to(dtype)
    output = generate(model, PROMPTS, SAMPLED)
    assert [len(ids) for ids in output.ids] == [12] * 4
    assert generate(model, PROMPTS, SAMPLED) == output
