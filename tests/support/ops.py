"""What the tests of every operator share: a backend against the float64 reference, opcheck, compile, input hygiene.

A call is a function and its keyword arguments, as an operator's specs.py draws them. The floating tensors among the
arguments are what gradients are taken of.
"""

import importlib.util
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_linear.base.numerics import relative_error, tolerance
from kimi_linear.ops import native
from kimi_linear.ops.registry import OPS, Call

Arguments = dict[str, Any]
Function = Callable[..., Any]

# Where the tests of Triton kernels put their tensors: interpreted on the CPU, compiled on a GPU.
DEVICE = os.environ.get("KIMI_LINEAR_TEST_DEVICE", "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COTANGENT_SEED = 1234
# For what only Triton, a GPU, the CPU, or the native kernels can run.
TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'kimi-linear[triton]'"
)
GPU = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU: set KIMI_LINEAR_TEST_DEVICE=cuda")
CPU = pytest.mark.skipif(DEVICE != "cpu", reason="about calls on the CPU")
NATIVE = pytest.mark.skipif(native.why_unavailable() is not None, reason=str(native.why_unavailable()))


def backends(op: str, *dtypes: torch.dtype) -> list[str]:
    """Return the names of an operator's backends, for parametrising: of those that run all these dtypes on DEVICE.

    Where there are no native kernels their backend is left out. So are those that have files of their own, as
    tests/ops/delta_rule/test_triton.py: triton's, which is interpreted here and slow, and grouped_mm, which takes
    aligned sizes alone. On a GPU it is triton's that is on trial, alone.
    """
    missing = {"triton", "grouped_mm"} | ({"cpu"} if native.why_unavailable() else set())
    sizes: dict[str, int] = defaultdict(lambda: 1)
    calls = [Call(DEVICE, str(dtype).removeprefix("torch."), needs_grad=False, sizes=sizes) for dtype in dtypes]
    found = [b.name for b in OPS[op].backends if not any(b.refuse(call) for call in calls)]
    return [name for name in found if (name == "triton" if DEVICE == "cuda" else name not in missing)]


def backend_dtypes(op: str) -> list[tuple[str, torch.dtype]]:
    """Return every backend of an operator with every dtype it runs, for parametrising."""
    return [(backend, dtype) for dtype in DTYPES for backend in backends(op, dtype)]


def is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def in_float64(arguments: Arguments) -> Arguments:
    """Widen every floating tensor, so that a reference sees exactly the values that a backend sees."""
    return {name: value.double() if is_floating(value) else value for name, value in arguments.items()}


def on_cpu(arguments: Arguments) -> Arguments:
    """Copy every tensor to the CPU, where token-by-token references are no slower than on a GPU."""
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def as_outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def cotangents(outputs: list[Tensor]) -> list[Tensor]:
    """Draw one gradient an output, the same values for every dtype up to rounding."""
    generator = torch.Generator().manual_seed(COTANGENT_SEED)
    draws = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in outputs]
    return [draw.to(y) for draw, y in zip(draws, outputs, strict=True)]


def run_with_gradients(
    function: Function,
    arguments: Arguments,
    grad_outputs: list[Tensor] | None = None,
    wanted: Collection[str] | None = None,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the outputs and the gradient of every wanted argument (default: every floating one)."""
    names = [name for name, value in arguments.items() if is_floating(value) and (wanted is None or name in wanted)]
    leaves = {name: arguments[name].detach().requires_grad_() for name in names}
    outputs = as_outputs(function(**{**arguments, **leaves}))
    grads = grad_outputs or cotangents(outputs)
    found = torch.autograd.grad(outputs, list(leaves.values()), [g.to(y) for g, y in zip(grads, outputs, strict=True)])
    return [y.detach() for y in outputs], dict(zip(names, found, strict=True))


def assert_matches_reference(
    function: Function,
    arguments: Arguments,
    backend: str,
    dtype: torch.dtype,
    gate_gradients: Collection[str] = (),
    wanted: Collection[str] | None = None,
) -> None:
    """Compare a backend's outputs and gradients with the float64 reference, by the tolerance table's row for `dtype`.

    `gate_gradients` names the arguments whose gradients are sums of many cancelling terms. Checks the dtypes and shapes
    of the gradients too.
    """
    with nan_in_new_memory():
        outputs, grads = run_with_gradients(lambda **a: function(**a, backend=backend), arguments, wanted=wanted)
    # The cotangents were rounded to the dtype of the outputs; the reference gets the rounded ones.
    expected, expected_grads = run_with_gradients(
        lambda **a: function(**a, backend="reference"), in_float64(arguments), cotangents(outputs), wanted
    )
    allowed = tolerance(dtype)
    errors = {
        f"output {i}": (relative_error(y, reference), allowed.output)
        for i, (y, reference) in enumerate(zip(outputs, expected, strict=True))
    }
    for name, grad in grads.items():
        bound = allowed.gate_gradient if name in gate_gradients else allowed.gradient
        errors[f"gradient of {name}"] = (relative_error(grad, expected_grads[name]), bound)
        assert grad.dtype == arguments[name].dtype, name
        assert grad.shape == arguments[name].shape, name
    assert {name: pair for name, pair in errors.items() if not pair[0] <= pair[1]} == {}


@contextmanager
def nan_in_new_memory() -> Iterator[None]:
    """Fill every new tensor with NaN (integers: the greatest value), and refuse operations that vary between runs."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def assert_close(one: Tensor, other: Tensor) -> None:
    """Compare two results that differ by the order of a few operations, by the output tolerance of their dtype."""
    assert relative_error(one, other) <= tolerance(one.dtype).output


def gradcheck(function: Function, arguments: Arguments) -> bool:
    """Compare every gradient of a float64 call with finite differences."""
    names = [name for name, value in arguments.items() if is_floating(value)]
    leaves = tuple(arguments[name].detach().double().requires_grad_() for name in names)
    return torch.autograd.gradcheck(
        lambda *tensors: function(**{**arguments, **dict(zip(names, tensors, strict=True))}), leaves
    )


def assert_inputs_unchanged(function: Function, arguments: Arguments) -> None:
    """Run forward and backward; no argument may hold another bit afterwards."""
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor)}
    run_with_gradients(function, arguments)
    assert [name for name, value in before.items() if not torch.equal(value, arguments[name])] == []


def strided(tensor: Tensor) -> Tensor:
    """Return the same values with other strides, surrounded by NaN (integers: by their least value)."""
    filler = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min
    wide = torch.full((*(2 * size + 1 for size in tensor.shape),), filler, dtype=tensor.dtype, device=tensor.device)
    view = wide[tuple(slice(1, 2 * size, 2) for size in tensor.shape)]
    return view.copy_(tensor)


def assert_strides_do_not_matter(function: Function, arguments: Arguments, dtype: torch.dtype) -> None:
    """Outputs and gradients agree for contiguous tensors and for strided ones with NaN between."""
    other = {name: strided(value) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    outputs, grads = run_with_gradients(function, arguments)
    same, same_grads = run_with_gradients(function, other)
    errors = [relative_error(x, y) / tolerance(dtype).output for x, y in zip(same, outputs, strict=True)]
    errors += [relative_error(same_grads[name], grads[name]) / tolerance(dtype).gradient for name in grads]
    assert max(errors) <= 1


def assert_equal(one: tuple[list[Tensor], dict[str, Tensor]], other: tuple[list[Tensor], dict[str, Tensor]]) -> None:
    """Outputs and gradients agree bit for bit."""
    different = [f"output {i}" for i, (x, y) in enumerate(zip(one[0], other[0], strict=True)) if not torch.equal(x, y)]
    different += [f"gradient of {name}" for name in one[1] if not torch.equal(one[1][name], other[1][name])]
    assert different == []


def assert_runs_are_identical(function: Function, arguments: Arguments) -> None:
    """Two runs agree bit for bit, gradients included."""
    assert_equal(run_with_gradients(function, arguments), run_with_gradients(function, arguments))


def assert_compiles_whole(function: Function, arguments: Arguments) -> None:
    """The call compiles without a graph break and gives the same outputs and gradients as without the compiler."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_equal(run_with_gradients(function, arguments), run_with_gradients(compiled, arguments))


def opcheck(op: Any, *args: Any, **kwargs: Any) -> None:
    """Run torch's checks of a custom op: its schema, its autograd registration, its fake kernel, its tracing."""
    torch.library.opcheck(op, args, kwargs)


def requiring_grad(*values: Any) -> tuple[Any, ...]:
    """Return the values with every floating tensor as a leaf that requires a gradient."""
    return tuple(value.detach().requires_grad_() if is_floating(value) else value for value in values)


def profile(function: Callable[[], Any]) -> tuple[int, int]:
    """Run a function; return how many torch operations ran inside it, and the bytes of its largest new tensor."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.events() if event.name.startswith("aten::")]
    return len(events), max(event.self_cpu_memory_usage for event in events)
