"""The whole model: one result however a batch is given, the loss, and what is refused."""

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kimi_linear.base.errors import ConfigError, DtypeError, KimiLinearError, ShapeError, StateError
from kimi_linear.base.numerics import relative_error, tolerance
from kimi_linear.models.kimi_linear.model import KimiLinearLM
from kimi_linear.models.kimi_linear.presets import preset
from kimi_linear.nn.config import BlockConfig
from kimi_linear.nn.ffn import SwiGLUConfig
from kimi_linear.nn.mixers import GQAConfig

TINY = preset("tiny")
WINDOWED = BlockConfig(
    mixer=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=16, window=4, rope_theta=1e4),
    ffn=SwiGLUConfig(intermediate_size=32),
)
CONFIGS = {
    "hybrid": TINY,
    "gdn": preset("tiny-gdn"),
    "full attention": preset("tiny-mla"),
    "window": dataclasses.replace(TINY, blocks={**TINY.blocks, "window": WINDOWED}, layers=(*TINY.layers, "window")),
}
B, T = 3, 11
MASKS = {
    "left": [[0] * 4 + [1] * 7, [1] * 11, [0] * 10 + [1]],
    "right": [[1] * 7 + [0] * 4, [1] * 11, [1] + [0] * 10],
    "holes": [[0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 0], [1, 0] * 5 + [1], [0] * 5 + [1, 0, 0, 0, 0, 1]],
    "an empty row": [[1] * 11, [0] * 11, [0] * 3 + [1] * 8],
}

models = pytest.mark.parametrize("name", CONFIGS)
masks = pytest.mark.parametrize("mask", [torch.tensor(mask) for mask in MASKS.values()], ids=MASKS.keys())


def build(name: str = "hybrid", dtype: torch.dtype = torch.float64) -> KimiLinearLM:
    return KimiLinearLM(CONFIGS[name], generator=torch.Generator().manual_seed(0)).to(dtype).eval()


def tokens(batch: int = B, length: int = T, seed: int = 1) -> Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def offsets(*lengths: int) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def assert_close(x: Tensor | None, reference: Tensor | None) -> None:
    assert x is not None
    assert reference is not None
    assert relative_error(x, reference) <= tolerance(x.dtype).output


@models
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [[T], [1] * T, [4, 7], [1, 9, 1], [5, 1, 1, 4]], ids=lambda s: str(len(s)))
@torch.no_grad()
def test_a_whole_prompt_equals_its_pieces_through_a_cache(name: str, dtype: torch.dtype, sizes: list[int]) -> None:
    model, ids = build(name, dtype), tokens()
    cache = model.new_cache(B)
    pieces = [model(piece, cache=cache).logits for piece in ids.split(sizes, dim=1)]
    assert_close(torch.cat(pieces, dim=1), model(ids).logits)
    assert cache.lengths.tolist() == [T] * B


@models
@torch.no_grad()
def test_packed_sequences_equal_separate_ones(name: str) -> None:
    model, ids = build(name), tokens(1)
    lengths = (4, 0, 6, 1)
    packed = model(ids, cu_seqlens=offsets(*lengths)).logits
    assert packed is not None
    for piece, logits in zip(ids.split(lengths, 1), packed.split(lengths, 1), strict=True):
        if piece.shape[1]:
            assert_close(logits, model(piece).logits)


@models
@masks
@torch.no_grad()
def test_padded_rows_equal_the_same_rows_alone(name: str, mask: Tensor) -> None:
    model, ids = build(name), tokens()
    logits = model(ids, attention_mask=mask).logits
    assert logits is not None
    for row in range(B):
        real = mask[row] == 1
        assert not bool(logits[row, ~real].any())
        if bool(real.any()):
            assert_close(logits[row, real], model(ids[row, real][None]).logits[0])


@models
@masks
@torch.no_grad()
def test_padding_reaches_no_state(name: str, mask: Tensor) -> None:
    """After padded prompts and padded pieces the rows continue, one token at a time, as if they had been alone."""
    model, prompt, more, steps = build(name), tokens(), tokens(seed=2), tokens(length=3, seed=3)
    cache = model.new_cache(B)
    model(prompt, cache=cache, attention_mask=mask)
    model(more, cache=cache, attention_mask=mask.flip(1))
    assert cache.lengths.tolist() == (2 * mask.sum(1)).tolist()
    logits = torch.cat([model(steps[:, t : t + 1], cache=cache).logits for t in range(3)], dim=1)
    for row in range(B):
        pieces = [prompt[row, mask[row] == 1], more[row, mask[row].flip(0) == 1], steps[row]]
        assert_close(logits[row], model(torch.cat(pieces)[None]).logits[0, -3:])


@torch.no_grad()
def test_what_stands_at_padding_does_not_matter() -> None:
    model, ids, mask = build(), tokens(), torch.tensor(MASKS["holes"])
    other = torch.where(mask == 1, ids, (ids + 1) % 256)
    assert torch.equal(model(ids, attention_mask=mask).logits, model(other, attention_mask=mask).logits)


@torch.no_grad()
def test_a_mask_of_ones_changes_nothing() -> None:
    model, ids = build(), tokens()
    assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, model(ids).logits)


@models
@torch.no_grad()
def test_a_cache_continues_packed_sequences_of_different_lengths(name: str) -> None:
    model, first, second = build(name), tokens(1, 10), tokens(1, 6, seed=2)
    cache = model.new_cache(3)
    model(first, cache=cache, cu_seqlens=offsets(7, 0, 3))
    logits = model(second, cache=cache, cu_seqlens=offsets(1, 2, 3)).logits
    assert cache.lengths.tolist() == [8, 2, 6]
    assert logits is not None
    rows = [(first[:, :7], second[:, :1]), (first[:, :0], second[:, 1:3]), (first[:, 7:], second[:, 3:])]
    for (before, after), found in zip(rows, logits.split((1, 2, 3), 1), strict=True):
        assert_close(found, model(torch.cat([before, after], 1)).logits[:, -after.shape[1] :])


@torch.no_grad()
def test_a_forked_and_a_reordered_cache_continue_their_own_rows() -> None:
    model, ids, more = build(), tokens(), tokens(length=2, seed=2)
    cache = model.new_cache(B)
    model(ids, cache=cache)
    fork, rows = cache.fork(), torch.tensor([2, 0, 0, 1])
    reordered = cache.select_rows(rows)
    whole = model(torch.cat([ids, more], 1)).logits[:, -2:]
    assert_close(model(more, cache=cache).logits, whole)
    assert fork.lengths.tolist() == [T] * B
    assert_close(model(more, cache=fork).logits, whole)
    assert_close(model(more[rows], cache=reordered).logits, whole[rows])


@torch.no_grad()
def test_a_snapshot_resumes_bit_identically() -> None:
    model, ids, more = build(dtype=torch.float32), tokens(), tokens(length=1, seed=2)
    cache = model.new_cache(B)
    model(ids, cache=cache)
    restored = model.new_cache(B)
    restored.restore(cache.snapshot())
    assert torch.equal(model(more, cache=restored).logits, model(more, cache=cache).logits)
    assert restored.nbytes == cache.nbytes == B * model.config.state_bytes(T + 1, 4)


@models
@torch.no_grad()
def test_the_last_logits_are_those_of_the_whole(name: str) -> None:
    model, ids, mask = build(name), tokens(), torch.tensor(MASKS["an empty row"])
    assert_close(model(ids, last_only=True).logits, model(ids).logits[:, -1:])
    packed = model(ids[:1], cu_seqlens=offsets(4, 0, 7), last_only=True).logits
    assert_close(packed[:, [0, 2]], model(ids[:1], cu_seqlens=offsets(4, 0, 7)).logits[:, [3, 10]])
    assert not bool(packed[:, 1].any())
    padded = model(ids, attention_mask=mask, last_only=True).logits
    assert_close(padded[[0, 2]], model(ids, attention_mask=mask).logits[[0, 2], -1:])
    assert padded.shape == (B, 1, 256)
    assert not bool(padded[1].any())


def reference_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_the_loss_scores_each_token_on_the_next_label() -> None:
    model, ids = build(), tokens()
    labels = ids.clone()
    labels[0, 3:6] = -100
    out = model(ids, labels=labels, return_logits=True)
    assert_close(out.loss, reference_loss(out.logits, labels))
    assert model(ids, labels=labels).logits is None


def test_the_loss_never_crosses_packed_boundaries() -> None:
    model, ids, lengths = build(), tokens(1), (4, 0, 1, 6)
    out = model(ids, labels=ids, cu_seqlens=offsets(*lengths))
    pieces = [p for p in ids.split(lengths, 1) if p.shape[1] > 1]
    losses = [model(p, labels=p).loss * (p.shape[1] - 1) for p in pieces]
    assert_close(out.loss, sum(losses) / sum(p.shape[1] - 1 for p in pieces))


@masks
def test_the_loss_of_a_padded_batch_is_that_of_its_real_tokens(mask: Tensor) -> None:
    model, ids = build(), tokens()
    rows = [ids[row, mask[row] == 1][None] for row in range(B)]
    scored = [row for row in rows if row.shape[1] > 1]
    expected = sum(model(row, labels=row).loss * (row.shape[1] - 1) for row in scored)
    found = model(ids, labels=ids, attention_mask=mask).loss
    assert_close(found, expected / sum(row.shape[1] - 1 for row in scored))


def test_gradients_of_the_loss_are_those_of_the_logits_and_reach_every_trained_parameter() -> None:
    direct, fused, ids = build(), build(), tokens()
    reference_loss(direct(ids).logits, ids).backward()
    fused(ids, labels=ids).loss.backward()
    for (name, one), two in zip(direct.named_parameters(), fused.parameters(), strict=True):
        if one.requires_grad:
            assert relative_error(two.grad, one.grad) <= tolerance(torch.float64).gate_gradient, name
            assert float(two.grad.abs().max()) > 0, name
        else:
            assert name.endswith("e_score_correction_bias")


def test_packed_and_padded_batches_have_the_gradients_of_separate_rows() -> None:
    mask, ids = torch.tensor(MASKS["left"]), tokens()
    lengths = mask.sum(1).tolist()
    packed_ids = ids[mask == 1][None]

    def grads(loss: Callable[[KimiLinearLM], Tensor]) -> list[Tensor]:
        model = build()
        loss(model).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    def separate(model: KimiLinearLM) -> Tensor:
        rows = [row[None] for row in packed_ids[0].split(lengths) if len(row) > 1]
        return sum(model(row, labels=row).loss * (row.shape[1] - 1) for row in rows) / sum(n - 1 for n in lengths)

    expected = grads(separate)
    for found in (
        grads(lambda m: m(packed_ids, labels=packed_ids, cu_seqlens=offsets(*lengths)).loss),
        grads(lambda m: m(ids, labels=ids, attention_mask=mask).loss),
    ):
        for one, two in zip(expected, found, strict=True):
            assert relative_error(two, one) <= tolerance(torch.float64).gate_gradient


def test_a_loss_with_no_scored_label_is_zero() -> None:
    model, ids = build(), tokens()
    assert float(model(ids, labels=torch.full_like(ids, -100)).loss.detach()) == 0.0


def test_one_seed_gives_the_same_model_also_from_the_meta_device() -> None:
    direct = KimiLinearLM(TINY, generator=torch.Generator().manual_seed(5))
    with torch.device("meta"):
        late = KimiLinearLM(TINY)
    assert {p.device.type for p in late.parameters()} == {"meta"}
    late.to_empty(device="cpu").init_weights(torch.Generator().manual_seed(5))
    for (name, one), two in zip(direct.named_parameters(), late.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_a_fresh_model_predicts_evenly() -> None:
    model, ids = build(), tokens()
    assert float(model(ids, labels=ids).loss.detach()) == pytest.approx(torch.tensor(256.0).log().item(), rel=0.05)


def test_a_few_steps_learn_a_repeated_sequence_and_balance_the_experts() -> None:
    torch.manual_seed(0)
    model, ids = KimiLinearLM(TINY, generator=torch.Generator().manual_seed(0)).train(), tokens(2, 16)
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        model.update_router_bias()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    routers = [p for name, p in model.named_parameters() if name.endswith("e_score_correction_bias")]
    assert len(routers) == 3
    assert all(float(bias.abs().max()) > 0 for bias in routers)


@models
@torch.no_grad()
def test_bfloat16_models_run_and_keep_recurrent_states_in_float32(name: str) -> None:
    model, ids = build(name, torch.bfloat16), tokens()
    cache = model.new_cache(B)
    model(ids, cache=cache)
    logits = model(ids[:, :1], cache=cache).logits
    assert logits.dtype == torch.bfloat16
    assert bool(logits.isfinite().all())
    for state in cache.layers:
        for field, tensor in state.tensors().items():
            expected = {"recurrent": torch.float32, "lengths": torch.int64}.get(field, torch.bfloat16)
            assert tensor.dtype == expected, field


def test_autocast_gives_a_float32_loss_and_float32_gradients() -> None:
    model, ids = build(dtype=torch.float32).train(), tokens()
    expected = model(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert relative_error(loss, expected) <= tolerance(torch.bfloat16).output
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_the_whole_model_compiles_without_a_break() -> None:
    torch.compiler.reset()
    model, ids = build(dtype=torch.float32), tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(ids, labels=ids).loss, model(ids, labels=ids).loss)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(tokens()[0]), ShapeError, r"input_ids is \[11\], expected \[B, T\]"),
        (lambda m: m(tokens().float()), DtypeError, "int64 or int32"),
        (lambda m: m(tokens() + 200), ShapeError, "from 0 to 255"),
        (lambda m: m(tokens() - 300), ShapeError, "from 0 to 255"),
        (lambda m: m(tokens()[:, :0]), ShapeError, "no token"),
        (lambda m: m(tokens(), attention_mask=torch.zeros(B, T)), ShapeError, "no token"),
        (lambda m: m(tokens(), attention_mask=torch.zeros(B, T + 1)), ShapeError, "attention_mask is"),
        (lambda m: m(tokens(), labels=tokens()[:, 1:]), ShapeError, "labels is"),
        (lambda m: m(tokens(), cu_seqlens=offsets(T)), ShapeError, "packed row"),
        (lambda m: m(tokens(1), cu_seqlens=offsets(4, 4)), ShapeError, "cu_seqlens"),
        (lambda m: m(tokens(1), cu_seqlens=torch.tensor([0, 8, 4, T])), ShapeError, "cu_seqlens"),
        (
            lambda m: m(tokens(1), cu_seqlens=offsets(T), attention_mask=torch.ones(1, T)),
            ConfigError,
            "packed or padded",
        ),
        (lambda m: m(tokens(), cache=m.new_cache(2)), StateError, "2 rows, the call has 3"),
        (lambda m: m(tokens(1), cache=m.new_cache(1), cu_seqlens=offsets(4, 7)), StateError, "1 rows"),
        (lambda m: m(tokens(), cache=build("window").new_cache(B)), StateError, "5 layers, the model has 4"),
        (lambda m: m(tokens(), cache=build("gdn").new_cache(B)), StateError, "GDNState, expected KDAState"),
        (lambda m: m.new_cache(0), ShapeError, "batch_size is 0"),
    ],
)
def test_wrong_calls_are_refused_in_one_sentence(
    call: Callable[[KimiLinearLM], object], error: type[KimiLinearError], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(build())
