"""transformers' own kimi_linear gives the same results on our operators, and has its own code back afterwards."""

import copy
import importlib

import pytest
import torch

from kimi_linear.base.errors import BackendError
from kimi_linear.integrations.transformers import accelerate
from support.awkward import lively_model, prompt
from support.transformers import ABSENT, ROPE_WARNING, load_in_transformers, relative_gap

network = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear", reason=ABSENT)
# The package exports the function under the module's name.
patches = importlib.import_module("kimi_linear.integrations.transformers.accelerate")
pytestmark = pytest.mark.filterwarnings(ROPE_WARNING)

SHAPES = ("odd-heads", "first-mla", "mostly-mla")
OPERATORS = (
    "forget_gate",
    "gated_delta_rule_decode",
    "gated_rms_norm",
    "grouped_mlp",
    "kda",
    "mla_attention",
    "mla_decode",
    "rms_norm",
    "short_conv",
    "short_conv_decode",
)
STEPS = 32


@pytest.fixture(autouse=True)
def originals(monkeypatch):
    """No state is too small here; and every test ends with transformers' own code in place, whatever it did."""
    monkeypatch.setattr(patches, "_SMALLEST_STATE", 0)
    before = {place: vars(owner)[place[1]] for place, owner in places().items()}
    yield before
    for owner, name, original in reversed(patches._replaced):
        setattr(owner, name, original)
    patches._replaced.clear()
    assert {place: vars(owner)[place[1]] for place, owner in places().items()} == before


def places():
    return {(patch.owner, patch.name): patch.target(network) for patch in patches._PATCHES}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function from a shape's name to transformers' model of it in float32."""
    loaded = {}

    def load(name):
        if name not in loaded:
            directory = tmp_path_factory.mktemp(name) / "m"
            lively_model(name).save_pretrained(directory)
            loaded[name], _ = load_in_transformers(directory)
        return loaded[name]

    return load


@torch.no_grad()
def logits(model, ids, mask=None, steps=STEPS):
    """Logits of a prompt, then of one token at a time through a cache."""
    start = ids.shape[1] - steps
    reply = model(ids[:, :start], attention_mask=None if mask is None else mask[:, :start], use_cache=True)
    found = [reply.logits]
    for t in range(start, ids.shape[1]):
        shown = None if mask is None else mask[:, : t + 1]
        step = model(ids[:, t : t + 1], attention_mask=shown, past_key_values=reply.past_key_values)
        found.append(step.logits)
    return torch.cat(found, dim=1)


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def padded(name, length):
    """A batch of two, the second row padded on the left, and its mask."""
    ids = torch.cat([prompt(name, length), prompt(name, length + 1)[:, 1:]])
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    return ids, mask


@pytest.mark.parametrize("name", SHAPES)
def test_prompts_and_32_decode_steps_are_the_same(models, name):
    model, ids = models(name), prompt(name, 90 + STEPS)
    before = logits(model, ids)
    with accelerate():
        assert relative_gap(logits(model, ids), before) < 1e-4


@pytest.mark.parametrize("name", SHAPES)
def test_a_left_padded_batch_is_the_same(models, name):
    model, (ids, mask) = models(name), padded(name, 20 + STEPS)
    before = logits(model, ids, mask)
    with accelerate():
        after = logits(model, ids, mask)
    real = mask.bool()
    assert relative_gap(after[real], before[real]) < 1e-4


@pytest.mark.parametrize("name", SHAPES)
def test_a_prompt_in_pieces_is_the_same(models, name):
    model, ids = models(name), prompt(name, 40)
    with torch.no_grad(), accelerate():
        whole = model(ids).logits
        first = model(ids[:, :25], use_cache=True)
        second = model(ids[:, 25:], past_key_values=first.past_key_values)
    assert relative_gap(torch.cat([first.logits, second.logits], dim=1), whole) < 1e-4


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_chooses_the_same_tokens(models, name, beams):
    model, (ids, mask) = models(name), padded(name, 16)
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    before = model.generate(ids, attention_mask=mask, **options)
    with accelerate():
        assert torch.equal(model.generate(ids, attention_mask=mask, **options), before)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["odd-heads", "unnormalised", "mostly-mla"])
def test_the_gradients_of_every_parameter_are_the_same(models, name, checkpointing):
    model = copy.deepcopy(models(name)).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    ids = torch.cat([prompt(name, 70), prompt(name, 71)[:, 1:]])
    before = gradients(model, ids)
    with accelerate():
        after = gradients(model, ids)
    for name, gradient in before.items():
        assert relative_gap(after[name], gradient) < 1e-3, name


def test_bfloat16_is_as_close_to_float32_as_before(models):
    # Every expert is chosen in this shape, so that rounding does not change the route.
    model = copy.deepcopy(models("mostly-mla"))
    ids = prompt("mostly-mla", 40 + STEPS)
    exact = logits(model.bfloat16().float(), ids)
    before = logits(model.bfloat16(), ids)
    with accelerate():
        after = logits(model, ids)
    assert after.dtype == torch.bfloat16
    error, allowed = ((x.float() - exact).abs().mean() for x in (after, before))
    assert error < 1.2 * allowed


def test_packed_sequences_are_kept_apart(models):
    model, ids = models("odd-heads"), prompt("odd-heads", 50)
    positions = torch.cat([torch.arange(20), torch.arange(30)])[None]
    packed = {"cu_seqlens": torch.tensor([0, 20, 50]), "use_cache": False}
    with torch.no_grad():
        apart = torch.cat([model(ids[:, :20]).logits, model(ids[:, 20:]).logits], dim=1)
        with pytest.raises(ValueError, match="packed sequences"):
            model(ids, **packed)
        with accelerate():
            # By the offsets alone, and with the mask that transformers makes of positions.
            for given in (packed, {**packed, "position_ids": positions}):
                assert relative_gap(model(ids, **given).logits, apart) < 1e-4
            with pytest.raises(ValueError, match="packed sequences"):
                model(ids, seq_idx=torch.zeros(1, 50))


def test_every_operator_runs_and_no_original_does(models, originals, monkeypatch):
    called = set()

    def noting(name, run):
        def note(*args, **kwargs):
            called.add(name)
            return run(*args, **kwargs)

        return note

    def refuse(*args, **kwargs):
        raise AssertionError("transformers' own code ran")

    for name in OPERATORS:
        monkeypatch.setattr(patches, name, noting(name, getattr(patches, name)))
    monkeypatch.setattr(network.ALL_ATTENTION_FUNCTIONS, "get_interface", refuse)
    monkeypatch.setattr(torch.nn.functional, "conv1d", refuse)
    model, (ids, mask) = models("odd-heads"), padded("odd-heads", 40)
    with accelerate():
        logits(model, ids)
        gradients(model, ids)
        assert called == set(OPERATORS)
        # A step over padded prompts reads the cache by a table, still without transformers' attention.
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
            model(ids[:, :1], attention_mask=torch.cat([mask, mask[:, :1]], dim=1), past_key_values=cache)


def test_undoing_brings_back_every_function_and_every_bit(models, originals):
    model, ids = models("odd-heads"), prompt("odd-heads", 20 + STEPS)
    before = logits(model, ids)
    handle = accelerate()
    assert all(vars(owner)[name] is not originals[of, name] for (of, name), owner in places().items())
    handle.undo()
    assert all(vars(owner)[name] is originals[of, name] for (of, name), owner in places().items())
    assert torch.equal(logits(model, ids), before)
    handle.undo()


def test_a_second_call_is_harmless_and_a_block_undoes_only_its_own(originals):
    handle = accelerate()
    inside = network.causal_conv1d_fn
    with accelerate():
        assert network.causal_conv1d_fn is inside
    assert network.causal_conv1d_fn is inside
    again = accelerate()
    again.undo()
    assert network.causal_conv1d_fn is originals[None, "causal_conv1d_fn"]
    handle.undo()
    with pytest.raises(KeyError), accelerate():
        raise KeyError
    assert network.causal_conv1d_fn is originals[None, "causal_conv1d_fn"]


def test_tensors_off_the_cpu_take_the_code_of_transformers(models, monkeypatch):
    model = copy.deepcopy(models("first-mla")).to("meta", torch.bfloat16)
    for name in OPERATORS:
        monkeypatch.setattr(patches, name, None)
    with accelerate(), torch.no_grad():
        reply = model(torch.zeros(1, 5, dtype=torch.int64, device="meta"), use_cache=True)
        step = model(torch.zeros(1, 1, dtype=torch.int64, device="meta"), past_key_values=reply.past_key_values)
    assert step.logits.shape == (1, 1, 257)


class Adapted(torch.nn.Linear):
    def forward(self, x):
        return 1.5 * super().forward(x)


@pytest.mark.parametrize("how", ["hook", "adapter"])
def test_a_matrix_with_an_adapter_or_a_hook_is_not_read_past_it(models, how):
    model, ids = copy.deepcopy(models("mostly-mla")), prompt("mostly-mla", 20 + STEPS)
    for module in model.modules():
        if isinstance(module, network.KimiLinearAttention):
            if how == "hook":
                module.kv_b_proj.register_forward_hook(lambda module, args, output: 1.5 * output)
            else:
                module.kv_b_proj.__class__ = Adapted
    before = logits(model, ids)
    with accelerate():
        assert relative_gap(logits(model, ids), before) < 1e-4


def test_an_attention_that_the_user_chose_is_left_alone(models):
    model, ids = copy.deepcopy(models("mostly-mla")), prompt("mostly-mla", 20 + STEPS)

    def averaged(module, query, key, value, mask, **kwargs):
        return value.mean(dim=2, keepdim=True).expand(-1, -1, query.shape[2], -1).transpose(1, 2), None

    network.ALL_ATTENTION_FUNCTIONS["averaged"] = averaged
    try:
        model.set_attn_implementation("averaged")
        before = logits(model, ids)
        with accelerate():
            assert relative_gap(logits(model, ids), before) < 1e-4
    finally:
        del network.ALL_ATTENTION_FUNCTIONS["averaged"]


def test_one_token_after_a_prompt_still_has_gradients(models):
    model, ids = copy.deepcopy(models("mostly-mla")), prompt("mostly-mla", 30)
    # Of the last layer: transformers' own cache of the earlier ones is overwritten before a backward could read it.
    weight = model.model.layers[3].self_attn.kv_b_proj.weight

    def run():
        with torch.no_grad():
            cache = model(ids[:, :-1], use_cache=True).past_key_values
        step = model(ids[:, -1:], past_key_values=cache).logits
        return step.detach(), torch.autograd.grad(step.logsumexp(-1).sum(), weight)[0]

    before = run()
    with accelerate():
        for after, expected in zip(run(), before, strict=True):
            assert relative_gap(after, expected) < 1e-3


def test_what_is_too_small_to_gain_stays_with_transformers(models, monkeypatch):
    model, ids = models("odd-heads"), prompt("odd-heads", 9)
    with torch.no_grad(), accelerate():
        cache = model(ids, use_cache=True).past_key_values
        monkeypatch.setattr(patches, "_SMALLEST_STATE", 10**9)
        for name in ("forget_gate", "gated_delta_rule_decode", "gated_rms_norm", "grouped_mlp", "rms_norm"):
            monkeypatch.setattr(patches, name, None)
        model(ids[:, :1], past_key_values=cache)


def test_queries_from_a_latent_are_left_to_transformers():
    config = network.KimiLinearConfig(
        **dict.fromkeys(
            ("hidden_size", "intermediate_size", "kv_lora_rank", "vocab_size", "moe_intermediate_size"), 16
        ),
        **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "linear_head_dim"), 8),
        **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "linear_num_heads"), 2),
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
        num_local_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        q_lora_rank=12,
    )
    torch.manual_seed(0)
    model, ids = network.KimiLinearForCausalLM(config).eval(), torch.arange(16)[None].repeat(1, 3)
    before = logits(model, ids)
    with accelerate():
        assert relative_gap(logits(model, ids), before) < 1e-4


def test_another_network_is_refused_and_nothing_is_changed(originals, monkeypatch):
    monkeypatch.setattr(network, "causal_conv1d_update", lambda hidden_states, state, weight: None)
    with pytest.raises(BackendError, match=r"causal_conv1d_update .* called with hidden_states, state, weight, exp"):
        accelerate()
    monkeypatch.undo()
    monkeypatch.delattr(network.KimiLinearExperts, "forward")
    with pytest.raises(BackendError, match=r"KimiLinearExperts\.forward .* is missing, expected the arguments self, "):
        accelerate()
    monkeypatch.undo()
    assert network.causal_conv1d_fn is originals[None, "causal_conv1d_fn"]
    monkeypatch.setattr(patches, "_MODULE", "transformers.models.no_such_network")
    with pytest.raises(BackendError, match=r"cannot be imported .*; install transformers 5\.23"):
        accelerate()
