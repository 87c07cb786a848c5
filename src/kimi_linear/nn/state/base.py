"""The contract of what one layer remembers: copies, rows, snapshots."""

import dataclasses
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from kimi_linear.base.errors import StateError

S = TypeVar("S", bound="LayerState")

# What a snapshot is made of: tensors, and tags that say how to read them.
Snapshot = dict[str, Tensor | str]


@dataclasses.dataclass
class LayerState:
    """What one layer remembers; each subclass is a dataclass whose tensor fields have the rows on axis 0."""

    KIND: ClassVar[str]
    # The order of the axes of the main tensor.
    LAYOUT: ClassVar[str]

    @property
    def layout(self) -> str:
        """How to read the tensors; a snapshot with another tag is refused."""
        return self.LAYOUT

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensor fields by name, as they are."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @property
    def batch_size(self) -> int:
        """Rows."""
        return next(iter(self.tensors().values())).shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes in use; bookkeeping (lengths) not counted."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def allocated_nbytes(self) -> int:
        """Bytes held, in use or not; bookkeeping not counted."""
        return self.nbytes

    def fork(self: S) -> S:
        """Return an independent copy; changes nothing."""
        return dataclasses.replace(self, **{name: tensor.clone() for name, tensor in self.tensors().items()})

    def select_rows(self: S, rows: Tensor) -> S:
        """Return an independent state of the rows [M], in that order, repeats allowed; changes nothing."""
        chosen = {name: tensor[rows.to(tensor.device)] for name, tensor in self.tensors().items()}
        return dataclasses.replace(self, **chosen)

    def snapshot(self) -> Snapshot:
        """Return independent copies of the tensors in use, with tags for kind and layout; changes nothing."""
        copies = {name: tensor.clone() for name, tensor in self.tensors().items()}
        return {"kind": self.KIND, "layout": self.layout, **copies}

    def restore(self, snapshot: Snapshot) -> None:
        """Replace this state's contents by those of a snapshot, on this state's device.

        Raises:
            StateError: Another kind, layout, batch size, shape or dtype; nothing is changed then.
        """
        for tag, own in (("kind", self.KIND), ("layout", self.layout)):
            if snapshot.get(tag) != own:
                raise StateError(
                    f"snapshot has {tag} {snapshot.get(tag)!r}, this state has {own!r}; restore it into a state of "
                    "its own kind and layout."
                )
        restored = {}
        for name, own_tensor in self.tensors().items():
            given = snapshot.get(name)
            if not isinstance(given, Tensor):
                raise StateError(f"snapshot of a {self.KIND} state has no tensor {name!r}; it is incomplete.")
            self._check_restored(name, own_tensor, given)
            restored[name] = given.to(own_tensor.device, copy=True)
        for name, tensor in restored.items():
            setattr(self, name, tensor)

    def _check_restored(self, name: str, own: Tensor, given: Tensor) -> None:
        if own.dtype != given.dtype or self._fixed_shape(name, own) != self._fixed_shape(name, given):
            raise StateError(
                f"snapshot's {name} is {tuple(given.shape)} {given.dtype}, this {self.KIND} state's is "
                f"{tuple(own.shape)} {own.dtype}; restore it into a state of the same model, batch size and dtype."
            )

    def _fixed_shape(self, name: str, tensor: Tensor) -> tuple[int, ...]:
        return tuple(tensor.shape)


def check_state(state: Any, expected: type[S], rows: int) -> S:
    """Return the state if it is of the expected class with that many rows, else raise StateError."""
    if not isinstance(state, expected):
        raise StateError(f"state is a {type(state).__name__}, expected {expected.__name__}; use the layer's new_state.")
    if state.batch_size != rows:
        raise StateError(
            f"state has {state.batch_size} rows, the call has {rows} sequences; make a new state of that batch size."
        )
    return state
