"""Which backends an operator has, which one runs a call, and why the others do not.

A backend answers one question: given a description of the call, an empty list or the reasons it cannot run it. It
never falls back by itself. `choose` takes the first backend, in order of preference, that has no reason to refuse;
asked for by name, a backend that refuses is an error that lists every backend with its reasons.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kimi_linear.base import env
from kimi_linear.base.errors import BackendError
from kimi_linear.base.registry import Registry, unknown_name


@dataclass(frozen=True)
class Call:
    """What a backend may know of a call before it runs: nothing here needs the values of a tensor."""

    device: str
    dtype: str
    needs_grad: bool
    # Sizes by letter (B, T, H, HV, K, V, ...) and named features of the call ("packed", "scalar_decay", ...).
    sizes: dict[str, int] = field(default_factory=dict)
    features: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator. `run` has the operator's own argument list, checked and complete."""

    name: str
    run: Callable[..., Any]
    refuse: Callable[[Call], list[str]]
    # One line for the support table in the docs.
    summary: str
    # Whether it runs a call only when it is asked for by name.
    by_name_only: Callable[[Call], bool] = lambda call: False


class Op:
    """An operator: a name and its backends, most preferred first."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._backends: dict[str, Backend] = {}

    def add(self, backend: Backend) -> None:
        """Add a backend, behind those already there."""
        if backend.name in self._backends:
            raise BackendError(f"{self.name}: backend {backend.name!r} is registered twice.")
        self._backends[backend.name] = backend

    @property
    def backends(self) -> tuple[Backend, ...]:
        """The backends, most preferred first."""
        return tuple(self._backends.values())

    def reasons(self, call: Call) -> dict[str, list[str]]:
        """Return every backend's reasons to refuse the call; an empty list means it can run it."""
        return {backend.name: backend.refuse(call) for backend in self.backends}

    def choose(self, call: Call, backend: str | None = None) -> Backend:
        """Return the backend that runs the call: the named one, or the most preferred that can.

        Raises:
            BackendError: Unknown name, or nothing can run the call; lists every backend with its reasons.
        """
        wanted = backend or self._wanted_everywhere()
        if wanted is not None and wanted not in self._backends:
            raise BackendError(f"{self.name}: {unknown_name('backend', wanted, list(self._backends))}")
        candidates = self.backends if wanted is None else (self._backends[wanted],)
        for candidate in candidates:
            if not candidate.refuse(call) and (wanted is not None or not candidate.by_name_only(call)):
                return candidate
        head = f"backend {wanted!r} cannot run this call" if wanted else "no backend can run this call"
        raise BackendError(f"{self.name}: {head}.\n{self.why(call)}")

    def _wanted_everywhere(self) -> str | None:
        """Return the backend that KIMI_LINEAR_BACKEND asks of every operator, if this one has it."""
        wanted = env.read("KIMI_LINEAR_BACKEND")
        if not wanted:
            return None
        known = {backend.name for _, op in OPS.items() for backend in op.backends} | set(self._backends)
        if wanted not in known:
            raise BackendError(f"KIMI_LINEAR_BACKEND: {unknown_name('backend', wanted, sorted(known))}")
        return wanted if wanted in self._backends else None

    def why(self, call: Call) -> str:
        """Explain the choice for a call, one line a backend."""
        lines = []
        chosen = False
        for name, reasons in self.reasons(call).items():
            if reasons:
                verdict = "cannot: " + "; ".join(reasons)
            elif self._backends[name].by_name_only(call):
                verdict = "could run it; only when asked for by name"
            elif chosen:
                verdict = "could run it; a preferred backend comes first"
            else:
                verdict, chosen = "runs it", True
            lines.append(f"  {name}: {verdict}")
        sizes = ", ".join(f"{letter}={size}" for letter, size in call.sizes.items())
        features = f", {', '.join(sorted(call.features))}" if call.features else ""
        grad = "with gradients" if call.needs_grad else "without gradients"
        return "\n".join([f"{self.name} on {call.device}, {call.dtype}, {grad}, {sizes}{features}:", *lines])


OPS: Registry[Op] = Registry("operator")


def define(name: str, *backends: Backend) -> Op:
    """Register an operator with its backends, most preferred first, and return it."""
    op = Op(name)
    for backend in backends:
        op.add(backend)
    OPS.add(name, op)
    return op


def why(name: str, call: Call) -> str:
    """Explain which backend of the named operator runs a call, and why the others do not."""
    return OPS[name].why(call)
