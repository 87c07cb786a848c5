"""The states of all layers of a network."""

import dataclasses

from torch import Tensor

from kimi_linear.base.errors import StateError
from kimi_linear.nn.state.base import LayerState, Snapshot


@dataclasses.dataclass
class Cache:
    """The states of all layers of a network for one batch, and the tokens each row has seen.

    Fields: `layers`, one state a layer; `lengths` [B], int64, on the host.

    Example:
        >>> from kimi_linear.models.kimi_linear.model import KimiLinearLM
        >>> from kimi_linear.models.kimi_linear.presets import preset
        >>> cache = KimiLinearLM(preset("tiny")).new_cache(2)
        >>> copy = cache.fork()
        >>> copy.restore(cache.snapshot())
    """

    layers: tuple[LayerState, ...]
    lengths: Tensor

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.lengths.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes in use by all layers."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def allocated_nbytes(self) -> int:
        """Bytes held by all layers, in use or not."""
        return sum(layer.allocated_nbytes for layer in self.layers)

    def fork(self) -> "Cache":
        """Return an independent copy; changes nothing."""
        return Cache(tuple(layer.fork() for layer in self.layers), self.lengths.clone())

    def select_rows(self, rows: Tensor) -> "Cache":
        """Return an independent cache of the rows [M], in that order, repeats allowed; changes nothing."""
        return Cache(tuple(layer.select_rows(rows) for layer in self.layers), self.lengths[rows.to("cpu")])

    def snapshot(self) -> Snapshot:
        """Return one flat dictionary of copied tensors and tags, "layers.<index>.<field>"; changes nothing."""
        flat: Snapshot = {"lengths": self.lengths.clone()}
        for index, layer in enumerate(self.layers):
            flat.update({f"layers.{index}.{name}": value for name, value in layer.snapshot().items()})
        return flat

    def restore(self, snapshot: Snapshot) -> None:
        """Replace the contents of this cache by those of a snapshot.

        Raises:
            StateError: The snapshot is of another model, batch size, layout or dtype; nothing is changed then.
        """
        lengths = snapshot.get("lengths")
        if not isinstance(lengths, Tensor) or lengths.shape != self.lengths.shape:
            raise StateError(f"snapshot does not hold {self.batch_size} rows; restore it into a cache of its size.")
        given = {name.split(".")[1] for name in snapshot if name.startswith("layers.")}
        if len(given) != len(self.layers):
            raise StateError(
                f"snapshot holds {len(given)} layers, this cache has {len(self.layers)}; use its own model."
            )
        # Shallow copies, so that a refusal at a late layer leaves the early ones as they were.
        layers = tuple(dataclasses.replace(layer) for layer in self.layers)
        for index, layer in enumerate(layers):
            prefix = f"layers.{index}."
            layer.restore({k.removeprefix(prefix): v for k, v in snapshot.items() if k.startswith(prefix)})
        self.layers, self.lengths = layers, lengths.to("cpu", copy=True)
