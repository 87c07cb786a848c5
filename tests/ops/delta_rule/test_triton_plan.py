"""How a call is planned: segments of long sequences, what is kept for the backward, and the workspace's bytes."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kimi_linear.base import env
from kimi_linear.ops.delta_rule.specs import CoreCase, DeltaRuleCase
from support import ops
from support.delta_rule import draw, errors, reference, run

pytestmark = [
    ops.TRITON,
    # The interpreter takes a loop's bound for a scalar, which numpy 2.3 warns of and 2.4 refuses.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]
F32, BF16 = torch.float32, torch.bfloat16
# Three chunks of 16 tokens, in segments of two.
CASES = {
    "core": ("kda_core", CoreCase(name="core", H=1, HV=2, T=33)),
    "core_packed": ("kda_core", CoreCase(name="packed", H=1, lengths=(0, 17, 0, 1), initial_state=False)),
    "pre_mixed": ("delta_rule", DeltaRuleCase(name="pre", H=1, T=33, read="pre", gate="mixed")),
    "scalar": ("delta_rule", DeltaRuleCase(name="scalar", H=1, lengths=(36, 0), scalar_decay=True, gate="separators")),
    "no_erase": ("delta_rule", DeltaRuleCase(name="no_erase", H=1, T=33, B=2, erase="none", initial_state=False)),
    "K_over_V": ("delta_rule", DeltaRuleCase(name="K_over_V", H=1, T=33, K=36, V=5)),
}
each_case = pytest.mark.parametrize("name", CASES)


def in_segments(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """Cut every sequence into segments of so many chunks."""
    from kimi_linear.ops.delta_rule.triton import plan

    monkeypatch.setattr(plan, "segment_length", lambda programs, chunks: length)


@each_case
def test_segments_give_the_results_and_gradients_of_the_reference(name, monkeypatch) -> None:
    op, case = CASES[name]
    inputs = draw(case, F32)
    in_segments(monkeypatch, 2)
    with ops.nan_in_new_memory():
        found = run(op, inputs, "triton")
    assert errors(found, reference(op, inputs, found), F32) == {}


def test_segments_in_half_precision(monkeypatch) -> None:
    from kimi_linear.ops.delta_rule.triton import plan

    chosen = plan.tiles
    monkeypatch.setattr(plan, "tiles", lambda *given: dataclasses.replace(chosen(*given), chunk=16))
    in_segments(monkeypatch, 1)
    inputs = draw(DeltaRuleCase(name="half", H=1, T=49, K=16, V=16), BF16)
    with ops.nan_in_new_memory():
        found = run("delta_rule", inputs, "triton")
    assert errors(found, reference("delta_rule", inputs, found), BF16) == {}


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("lengths", [(70,), (0, 33, 0, 0, 16, 1, 0), (0, 0), (16, 16)])
def test_segments_cover_every_token_once_in_order(lengths, length) -> None:
    from kimi_linear.ops.delta_rule.triton.chunks import cut

    size, offsets = 16, torch.tensor([0, *lengths]).cumsum(0)
    T = int(offsets[-1])
    chunks = cut(offsets, 1, T, size, torch.device("cpu"))
    found = chunks.segments(length, -(-T // (size * length)) + len(lengths))
    expected = [
        (start, min(start + size * length, end), int(chunks.first[n]) + (start - begin) // size)
        for n, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False))
        for start in range(begin, end, size * length)
    ]
    spans = list(zip(found.cu_seqlens.tolist(), found.cu_seqlens.tolist()[1:], found.chunk.tolist(), strict=False))
    assert spans[: len(expected)] == expected
    assert all(start == end == T for start, end, _ in spans[len(expected) :])
    counts = [-(-n // (size * length)) for n in lengths]
    assert found.first.diff().tolist() == counts


def test_segments_are_for_few_programs_and_long_sequences() -> None:
    from kimi_linear.ops.delta_rule.triton.segments import LEAST, LONG, segment_length

    assert segment_length(programs=4, chunks=1024) * 4 * 132 >= 1024 * 4
    assert segment_length(programs=4, chunks=1024) == -(-1024 * 4 // 132)
    assert segment_length(programs=1, chunks=LONG) == LEAST
    assert segment_length(programs=67, chunks=1024) == 0
    assert segment_length(programs=1, chunks=LONG - 1) == 0
    assert segment_length(programs=0, chunks=1024) == 0
    with env.changed("KIMI_LINEAR_TRITON_SEGMENTS", "0"):
        assert segment_length(programs=4, chunks=1024) == 0


def test_a_long_sequence_of_one_head_is_cut_and_a_short_one_is_not(monkeypatch) -> None:
    from kimi_linear.ops.delta_rule.triton import plan

    inputs = core_inputs(T=1040, H=1, HV=1, K=16, V=16)
    assert plan.plan(inputs, None, 1, 1040).segments == 5
    assert plan.plan(inputs, torch.tensor([0, 40, 1040]), 1, 1040).segments == 5 + 2
    assert plan.plan(core_inputs(T=1000, H=1, HV=1, K=16, V=16), None, 1, 1000).segments == 0


@pytest.mark.parametrize(
    ("name", "keep", "segment"),
    [("core", "factors", 0), ("core_packed", "states", 0), ("pre_mixed", "states", 2), ("no_erase", "factors", 2)],
)
def test_what_is_kept_changes_no_bit(name, keep, segment, monkeypatch) -> None:
    op, case = CASES[name]
    inputs = draw(case, F32)
    in_segments(monkeypatch, segment)
    found = run(op, inputs, "triton")
    with env.changed("KIMI_LINEAR_TRITON_KEEP", keep):
        again = run(op, inputs, "triton")
    assert [n for n in found if not torch.equal(found[n], again[n])] == []


def test_a_kept_call_may_be_differentiated_twice_over() -> None:
    """The backward leaves what was kept as it was."""
    from kimi_linear.ops import kda_core

    inputs = draw(CoreCase(name="x", H=1, T=20), F32)
    leaves = {n: x.requires_grad_() for n, x in inputs.items() if isinstance(x, Tensor)}
    with env.changed("KIMI_LINEAR_TRITON_KEEP", "states"):
        o, _ = kda_core(**{**inputs, **leaves}, backend="triton")
    first, second = (torch.autograd.grad(o.sum(), list(leaves.values()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_without_gradients_nothing_is_kept(monkeypatch) -> None:
    from kimi_linear.ops import kda_core
    from kimi_linear.ops.delta_rule.triton import launch

    asked, forward = [], launch.forward
    monkeypatch.setattr(launch, "forward", lambda *given: asked.append(given[-1]) or forward(*given))
    inputs = draw(CoreCase(name="x", H=1, T=40), F32)
    with env.changed("KIMI_LINEAR_TRITON_KEEP", "states"):
        kda_core(**inputs, backend="triton")
        kda_core(**{**inputs, "v": inputs["v"].clone().requires_grad_()}, backend="triton")
    assert asked == ["inputs", "states"]


class Allocated(TorchDispatchMode):
    """Adds up the bytes of new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format:
            self.bytes += result.numel() * result.element_size()
        return result


def core_inputs(T: int, H: int, HV: int, K: int, V: int, dtype: torch.dtype = F32) -> Any:
    from kimi_linear.ops.delta_rule.triton.inputs import Inputs

    q, k, v, g, beta = (torch.zeros(T, *n, dtype=dtype) for n in ((H, K), (H, K), (HV, V), (HV, K), (HV,)))
    return Inputs(q, k, None, v, g, beta, torch.zeros(HV), torch.zeros(HV * K), None, 1.0, raw=True)


def inputs_of(kind: str, T: int) -> Any:
    inputs = core_inputs(T, 2, 4, 20, 36, F32 if kind == "free" else BF16)
    if kind == "core":
        return inputs
    inputs = dataclasses.replace(inputs, A_log=None, dt_bias=None, raw=False)
    if kind == "scalar":
        return dataclasses.replace(inputs, g=torch.zeros(T, 4))
    return dataclasses.replace(inputs, beta=None, erase=inputs.k.clone()) if kind == "free" else inputs


@pytest.mark.parametrize("kind", ["core", "scalar", "free", "weighed"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("keep", "segment"), [("inputs", 0), ("factors", 1), ("states", 0), ("states", 1)])
def test_the_workspace_is_as_large_as_it_says(kind, packed, keep, segment, monkeypatch) -> None:
    from kimi_linear.ops.delta_rule.triton import launch
    from kimi_linear.ops.delta_rule.triton.plan import kept_bytes, workspace_bytes

    monkeypatch.setattr(launch, "start", lambda *_, **__: None)
    in_segments(monkeypatch, segment)
    T, HV, K, V = 75, 4, 20, 36
    inputs = inputs_of(kind, T)
    cu_seqlens = torch.tensor([0, 40, 40, T]) if packed else None
    B, N = (1, 3) if packed else (3, 3)
    shape = (inputs, cu_seqlens, B, T if packed else T // 3)
    state = N * HV * K * V * 4
    forward, backward = workspace_bytes(*shape, keep)
    with Allocated() as found:
        _, final, kept = launch.forward(*shape, keep)
    assert found.bytes == forward + state
    assert kept.nbytes == kept_bytes(*shape, keep)
    with Allocated() as found:
        launch.backward(*shape, torch.zeros_like(inputs.value), final, kept, keep)
    # Gradients of q and k are results where no group is summed and nothing normalised; here groups are.
    assert found.bytes == backward + state


def test_the_workspace_a_token_is_what_the_readme_says() -> None:
    from kimi_linear.ops.delta_rule.triton.inputs import Inputs
    from kimi_linear.ops.delta_rule.triton.plan import kept_bytes, workspace_bytes

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=BF16, device="meta")

    T, H, D = 8192, 64, 128
    x = [empty(T, H, D) for _ in range(4)]
    inputs = Inputs(x[0], x[1], None, x[2], x[3], empty(T, H), empty(H), empty(H * D), None, 1.0, raw=True)
    for keep, expected in README_BYTES.items():
        found = (kept_bytes(inputs, None, 1, T, keep), *workspace_bytes(inputs, None, 1, T, keep))
        assert [x / (T * H) for x in found] == pytest.approx(expected, rel=1e-3), keep


# Kept, forward, backward.
README_BYTES = {"inputs": (0, 1032, 3632.25), "factors": (1032, 1032, 2856.25), "states": (1800, 1800, 2088.25)}
