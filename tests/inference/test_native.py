"""A prepared model gives what the plain one gives, whatever the call, and never runs on weights that have changed."""

import copy
import dataclasses
import gc
import pickle
import weakref

import pytest
import torch

from kimi_linear.base.errors import ConfigError, ShapeError
from kimi_linear.causal_lm import KimiLinearForCausalLM
from kimi_linear.inference.params import SamplingParams
from kimi_linear.models.kimi_linear.presets import preset
from kimi_linear.nn.config import BlockConfig
from kimi_linear.nn.ffn import MoEConfig, SwiGLUConfig
from kimi_linear.nn.mixers import GQAConfig, KDAConfig, MLAConfig
from support import ops

pytestmark = ops.NATIVE

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12, stop_token_ids=())


def odd_config():
    """Nothing a multiple of a vector, more value heads than heads, rotary positions, bounded gate, softmax router."""
    kda = KDAConfig(num_heads=2, head_dim=12, head_v_dim=10, num_v_heads=4, conv_size=3, gate_lower_bound=-5.0)
    mla = MLAConfig(
        num_heads=3, kv_lora_rank=20, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=14, rope_theta=100.0
    )
    moe = MoEConfig(num_experts=5, top_k=3, intermediate_size=18, num_shared_experts=0, activation="softmax")
    blocks = {
        "kda": BlockConfig(mixer=kda, ffn=moe),
        "mla": BlockConfig(mixer=mla, ffn=SwiGLUConfig(intermediate_size=50)),
    }
    return dataclasses.replace(
        preset("tiny"), vocab_size=101, hidden_size=40, blocks=blocks, layers=("kda", "mla", "kda"), tie_embeddings=True
    )


CONFIGS = {"tiny": preset("tiny"), "mla": preset("tiny-mla"), "odd": odd_config()}


def build(config="tiny", dtype=torch.float32):
    # Weights large enough for logits far apart and routers that choose.
    given = CONFIGS.get(config) or preset(config)
    model = KimiLinearForCausalLM(
        dataclasses.replace(given, initializer_range=0.2), generator=torch.Generator().manual_seed(0)
    )
    return model.to(dtype).eval()


def prompts(model, rows=3, tokens=9, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (rows, tokens), generator=generator)


@pytest.fixture(params=list(CONFIGS))
def pair(request):
    plain = build(request.param)
    return plain, build(request.param).prepare_for_inference("float32")


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, **LOGITS)


# Of logits of magnitude 1 to 30 after a few layers of float32.
LOGITS = {"rtol": 1e-4, "atol": 1e-4}


@torch.no_grad()
def test_logits_are_those_of_the_plain_model(pair):
    plain, prepared = pair
    ids = prompts(plain)
    assert_close(prepared(ids).logits, plain(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(), (1,), (4,), (8,), (3, 4, 5, 6), tuple(range(1, 9))])
def test_every_split_of_a_prompt_gives_the_same(pair, cuts):
    plain, prepared = pair
    ids = prompts(plain)
    cache = prepared.new_cache(3)
    parts = [prepared(part, cache=cache).logits for part in ids.tensor_split(cuts, dim=1)]
    assert_close(torch.cat(parts, 1), plain(ids).logits)
    assert cache.lengths.tolist() == [9, 9, 9]


def test_greedy_generation_gives_the_same_tokens(pair):
    plain, prepared = pair
    ragged = [[5, 9, 2, 7], [1], [3, 4, 8, 2, 6, 1, 1, 9], [7, 7]]
    assert torch.equal(prepared.generate(ragged, GREEDY), plain.generate(ragged, GREEDY))


@torch.no_grad()
def test_rows_of_different_lengths_decode_like_rows_alone(pair):
    plain, prepared = pair
    lengths, new = [7, 1, 4], torch.tensor([[3], [5], [6]])
    ids = prompts(plain, tokens=7)
    mask = torch.arange(7) >= 7 - torch.tensor(lengths)[:, None]
    cache = prepared.new_cache(3)
    prepared(ids, cache=cache, attention_mask=mask)
    logits = prepared(new, cache=cache).logits
    for row, length in enumerate(lengths):
        whole = torch.cat([ids[row, 7 - length :], new[row]])
        assert_close(logits[row, -1], plain(whole[None]).logits[0, -1])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_a_decoded_row_does_not_depend_on_its_neighbours(kind):
    prepared = build("odd").prepare_for_inference(kind)
    ids = prompts(prepared, rows=17, tokens=6)
    cache = prepared.new_cache(17)
    prepared(ids[:, :5], cache=cache)
    for row in (0, 11, 16):
        alone = cache.select_rows(torch.tensor([row]))
        together = cache.fork()
        for _ in range(3):
            expected = prepared(ids[row : row + 1, 5:], cache=alone).logits
            assert torch.equal(prepared(ids[:, 5:], cache=together).logits[row : row + 1], expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_the_number_of_threads_changes_no_bit(kind):
    prepared = build("tiny").prepare_for_inference(kind)
    ids, before = prompts(prepared, tokens=20), torch.get_num_threads()

    def run(threads):
        torch.set_num_threads(threads)
        cache = prepared.new_cache(3)
        logits = [prepared(ids, cache=cache).logits]
        return torch.cat([*logits, *(prepared(ids[:, i : i + 1], cache=cache).logits for i in range(8))], 1)

    try:
        assert torch.equal(run(1), run(3))
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_a_cache_goes_back_and_forth(pair):
    plain, prepared = pair
    ids = prompts(plain, tokens=12)
    cache = plain.new_cache(3)
    takes_turns = [(plain if i % 2 else prepared)(ids[:, i : i + 1], cache=cache).logits for i in range(12)]
    assert_close(torch.cat(takes_turns, 1), plain(ids).logits)
    restored = prepared.new_cache(3)
    restored.restore(cache.snapshot())
    assert_close(prepared(ids[:, :1], cache=restored).logits, plain(ids[:, :1], cache=cache).logits)


@torch.no_grad()
def test_two_caches_in_turns_do_not_mix(pair):
    plain, prepared = pair
    ids, other = prompts(plain), prompts(plain, seed=2)
    first, second = prepared.new_cache(3), prepared.new_cache(3)
    pieces = []
    for i in range(9):
        pieces.append(prepared(ids[:, i : i + 1], cache=first).logits)
        prepared(other[:, i : i + 1], cache=second)
    assert_close(torch.cat(pieces, 1), plain(ids).logits)


@torch.no_grad()
def test_a_long_context_is_attended_to_in_pieces():
    plain, prepared = build("odd"), build("odd").prepare_for_inference("float32")
    ids = prompts(plain, rows=1, tokens=1100)
    cache = prepared.new_cache(1)
    prepared(ids[:, :1099], cache=cache)
    assert_close(prepared(ids[:, 1099:], cache=cache).logits[:, 0], plain(ids).logits[:, -1])


@torch.no_grad()
def test_bfloat16_is_as_near_to_float64_as_the_plain_model():
    # Without a router, whose near ties would be decided either way.
    demo = preset("demo")
    dense = demo.blocks["kda_dense"].ffn
    blocks = {name: BlockConfig(mixer=demo.blocks[name].mixer, ffn=dense) for name in ("kda", "mla")}
    config = dataclasses.replace(demo, layers=("kda", "mla"), blocks=blocks, vocab_size=500)
    plain = KimiLinearForCausalLM(config, generator=torch.Generator().manual_seed(0)).bfloat16().eval()
    prepared = copy.deepcopy(plain).prepare_for_inference("bfloat16")
    ids = prompts(plain, rows=2, tokens=24)
    exact = copy.deepcopy(plain).double()(ids).logits
    cache = prepared.new_cache(2)
    parts = [prepared(part, cache=cache).logits for part in ids.split([8, *[1] * 16], dim=1)]
    error = (torch.cat(parts, 1) - exact).norm() / exact.norm()
    assert error <= 1.1 * (plain(ids).logits - exact).norm() / exact.norm()


@torch.no_grad()
@pytest.mark.parametrize(("kind", "bound"), [("bfloat16", 1e-4), ("int8", 1e-3), ("int4", 5e-2)])
def test_quantised_weights_stay_near_in_divergence(kind, bound):
    # Fresh weights of the usual size: next-token distributions as flat as a model's early ones.
    plain = KimiLinearForCausalLM(preset("demo"), generator=torch.Generator().manual_seed(0)).eval()
    ids = prompts(plain, rows=2, tokens=16)
    expected = plain(ids).logits.log_softmax(-1)
    plain.prepare_for_inference(kind)
    cache = plain.new_cache(2)
    parts = [plain(part, cache=cache).logits for part in ids.split([8, *[1] * 8], dim=1)]
    found = torch.cat(parts, 1).log_softmax(-1)
    divergence = (expected.exp() * (expected - found)).sum(-1)
    assert divergence.mean() < bound


@torch.no_grad()
@pytest.mark.parametrize("name", ["o_proj", "f_b_proj", "q_conv1d"])
def test_a_changed_parameter_is_never_used_in_its_old_form(name):
    plain, prepared = build(), build().prepare_for_inference("float32")
    ids = prompts(plain)
    prepared(ids)
    for model in (plain, prepared):
        getattr(model.model.layers[1].self_attn, name).weight.mul_(1.5)
    assert_close(prepared(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("how", ["optimiser", "load", "assign", "cast"])
def test_new_weights_between_two_tokens_are_noticed(how):
    plain, prepared = build(), build().prepare_for_inference("float32")
    ids, other = prompts(plain, rows=1), build("tiny")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    caches = [model.new_cache(1) for model in (plain, prepared)]
    logits = []
    for model, cache in zip((plain, prepared), caches, strict=True):
        with torch.no_grad():
            model(ids, cache=cache)
            model(ids[:, :1], cache=cache)
        if how == "optimiser":
            model(ids, labels=ids).loss.backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        elif how == "cast":
            model.bfloat16().float()
        else:
            model.load_state_dict(other.state_dict(), assign=how == "assign")
        with torch.no_grad():
            logits.append(model(ids[:, 1:2], cache=cache).logits)
    assert_close(logits[1], logits[0])


def test_training_and_gradients_run_the_plain_modules():
    plain, prepared = build(), build().prepare_for_inference("int4")
    ids = prompts(plain)
    for model in (plain, prepared):
        model.train()
        model(ids, labels=ids).loss.backward()
    for expected, found in zip(plain.parameters(), prepared.parameters(), strict=True):
        assert (expected.grad is None and found.grad is None) or torch.equal(expected.grad, found.grad)
    assert prepared.eval()(ids).logits.requires_grad
    with torch.no_grad():
        assert not torch.equal(prepared(ids).logits, plain.eval()(ids).logits)


@torch.no_grad()
def test_a_cache_that_is_let_go_is_freed(pair):
    _, prepared = pair
    ids = prompts(prepared)
    cache = prepared.new_cache(len(ids))
    for piece in (ids[:, :-1], ids[:, -1:]):
        prepared(piece, cache=cache)
    tensors = [weakref.ref(x) for layer in cache.layers for x in layer.tensors().values()]
    assert all(x() is not None for x in tensors)
    del cache
    gc.collect()
    assert [x() for x in tensors] == [None] * len(tensors)


@torch.no_grad()
def test_an_evaluation_loss_is_that_of_the_plain_model(pair):
    plain, prepared = pair
    ids = prompts(plain)
    with torch.no_grad():
        torch.testing.assert_close(prepared(ids, labels=ids).loss, plain(ids, labels=ids).loss, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_released_weights_leave_inference_as_it_was(kind, tmp_path):
    kept = build().prepare_for_inference(kind)
    released = build().prepare_for_inference(kind, keep_weights=False)
    ragged = [[5, 9, 2, 7], [1], [3, 4, 8]]
    assert torch.equal(released.generate(ragged, GREEDY), kept.generate(ragged, GREEDY))
    held = sum(parameter.nbytes for parameter in released.parameters() if not parameter.is_meta)
    assert held < 0.5 * sum(parameter.nbytes for parameter in kept.parameters())
    ids = prompts(kept)
    for refused in (
        lambda: released.train()(ids),
        lambda: released.eval()(ids, labels=ids),
        lambda: released.save_pretrained(tmp_path / "model"),
        lambda: released.prepare_for_inference("float32"),
    ):
        with pytest.raises(ConfigError, match="keep_weights"):
            refused()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_not_prepared_and_run(duplicate):
    prepared = build().prepare_for_inference("float32")
    twin = duplicate(prepared)
    assert (twin.prepared_weights, prepared.prepared_weights) == (None, "float32")
    assert torch.equal(twin.generate([[1, 2, 3]], GREEDY), prepared.generate([[1, 2, 3]], GREEDY))


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny-gdn", "gqa"])
def test_mixers_without_a_native_step_run_on_packed_matrices(name):
    def make():
        if name != "gqa":
            return build(name)
        tiny = preset("tiny")
        block = BlockConfig(
            mixer=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=16), ffn=SwiGLUConfig(intermediate_size=96)
        )
        config = dataclasses.replace(tiny, blocks={"gqa": block}, layers=("gqa",) * 2, initializer_range=0.2)
        return KimiLinearForCausalLM(config, generator=torch.Generator().manual_seed(0)).eval()

    plain, prepared = make(), make().prepare_for_inference("float32")
    assert torch.equal(prepared.generate([[1, 2, 3], [4]], GREEDY), plain.generate([[1, 2, 3], [4]], GREEDY))
    ids = prompts(plain)
    assert_close(prepared(ids).logits, plain(ids).logits)


def test_errors_say_what_is_wrong(pair):
    plain, prepared = pair
    with pytest.raises(ConfigError, match="int5"):
        build().prepare_for_inference("int5")
    with pytest.raises(ConfigError, match="float64"):
        build(dtype=torch.float64).prepare_for_inference("float32")
    cache = prepared.new_cache(1)
    with torch.no_grad():
        for token in (-1, plain.config.vocab_size):
            with pytest.raises(ShapeError, match=str(token)):
                prepared(torch.tensor([[token]]), cache=cache)
    assert cache.lengths.tolist() == [0]


def test_from_pretrained_prepares(tmp_path):
    plain = build()
    plain.save_pretrained(tmp_path / "model")
    loaded = KimiLinearForCausalLM.from_pretrained(tmp_path / "model", weights="float32")
    assert loaded.prepared_weights == "float32"
    assert torch.equal(loaded.generate([[1, 2, 3]], GREEDY), plain.generate([[1, 2, 3]], GREEDY))
