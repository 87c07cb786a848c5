"""A plan says who holds which tokens, documents and states; what does not fit is refused in one sentence."""

import itertools
import random
from pathlib import Path

import pytest
import torch

from kimi_linear.base.errors import ConfigError, ShapeError
from kimi_linear.ops import ContextParallel, delta_rule_cp, short_conv_cp
from support import context_parallel as support
from support import ranks

Args = tuple[tuple[int, ...], tuple[int, ...]]


def some_plans() -> list[Args]:
    """Return borders and offsets drawn from few tokens: ranks and documents are often empty, and cuts coincide."""
    draw = random.Random(0)
    found = []
    for _ in range(300):
        T = draw.choice((0, 1, 3, 8))
        inner = [sorted(draw.randint(0, T) for _ in range(draw.randint(0, 5))) for _ in range(2)]
        found.append(((0, *inner[0], T), (0, *inner[1], T)))
    return found


@pytest.mark.parametrize("args", [some_plans()])
def test_plans_of_all_ranks_fit_together(args: list[Args]) -> None:
    for borders, offsets in args:
        plans = [ContextParallel(r, borders, offsets, is_packed=True) for r in range(len(borders) - 1)]
        every = list(range(len(offsets) - 1))
        assert [n for plan in plans for n in plan.starts] == every
        assert [n for plan in plans for n in plan.ends] == every
        owners = [n for n in every for _ in range(offsets[n], offsets[n + 1])]
        held = [owners[borders[r] : borders[r + 1]] for r in range(len(plans))]
        for plan, tokens in zip(plans, held, strict=True):
            before = [n for h in held[: plan.rank] for n in h]
            after = [n for h in held[plan.rank + 1 :] for n in h]
            assert plan.tokens == len(tokens)
            assert {n for n in plan.documents if offsets[n] < offsets[n + 1]} == set(tokens) | (
                set(before) & set(after)
            )
            assert plan.enters == bool(set(before) & (set(tokens) | set(after)))
            assert plan.leaves == bool(set(after) & (set(tokens) | set(before)))
            pairs = itertools.pairwise(plan.cu_seqlens.tolist())
            assert [n for n, (a, b) in zip(plan.documents, pairs, strict=False) for _ in range(a, b)] == tokens
            assert plan.is_cut == any(p.enters for p in plans)
            assert plan.any_passes == any(p.passes for p in plans)
            if plan.leaves and tokens:
                assert tokens.index(plan.documents[-1]) == plan.tail


def test_ranks_make_plans_together_and_agree_on_what_does_not_fit(tmp_path: Path) -> None:
    borders = (0, 5, 5, 8, 10)
    for rank, (packed, dense, differs, short) in enumerate(ranks.run(4, support.build_work, tmp_path)):
        device = torch.device("cpu")
        assert packed == ContextParallel(rank, borders, (0, 2, 2, 9, 10), is_packed=True, device=device)
        assert dense == ContextParallel(rank, borders, (0, 10))
        assert differs == (
            "context parallel: cu_seqlens differs between ranks 0 and 2, expected the offsets of the whole sequence, "
            "the same on every rank."
        )
        assert "cu_seqlens runs from 0 to 10, expected from 0 to T = 11" in short


def test_without_a_process_group_no_plan_is_built() -> None:
    with pytest.raises(ConfigError, match=r"torch\.distributed is not initialised, expected a process group; call"):
        ContextParallel.build(5)


PLAN = ContextParallel(rank=1, borders=(0, 3, 8, 10), offsets=(0, 4, 6, 10), is_packed=True)


def conv(T: int = 5, B: int = 1, **options: object) -> None:
    short_conv_cp(PLAN, torch.zeros(B, T, 2), torch.zeros(2, 4), **options)


def delta(T: int = 5, **options: object) -> None:
    k = torch.zeros(1, T, 2, 4)
    delta_rule_cp(PLAN, k, k, k, k, -k, **options)


@pytest.mark.parametrize("call", [conv, delta])
def test_tokens_that_are_not_the_rank_s_are_refused(call: object) -> None:
    with pytest.raises(
        ShapeError, match=r"_cp: T is 4, expected 5, the plan's tokens of rank 1; build a plan a step\."
    ):
        call(T=4)


def test_a_batch_of_packed_documents_is_refused() -> None:
    with pytest.raises(ShapeError, match="short_conv_cp: B is 2 with packed documents, expected 1; concatenate"):
        conv(B=2)


@pytest.mark.parametrize(("call", "shape"), [(conv, (2, 3)), (delta, (2, 4, 4))])
def test_initial_states_of_documents_that_start_elsewhere_are_refused(call: object, shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ShapeError, match=r"initial_state holds 3 states, expected 2, .* start on rank 1 \(plan\.starts"
    ):
        call(initial_state=torch.zeros(3, *shape))


@pytest.mark.parametrize(("call", "shape"), [(conv, (2, 3)), (delta, (2, 4, 4))])
def test_an_initial_state_that_alone_needs_a_gradient_is_refused(call: object, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="initial_state needs a gradient and no argument with tokens does"):
        call(initial_state=torch.zeros(2, *shape, requires_grad=True))
