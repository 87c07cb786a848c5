"""The fewest bytes a call must move and the operations it counts for, from shapes and dtypes alone.

A token-head is one token of one value head. Bytes: each input read once, each output written once. An add and a
multiply count two. Letters: K key dim, V value dim, C chunk, H query heads of HV value heads; `item` bytes an element.
"""

from dataclasses import dataclass

CHUNK = 64


@dataclass(frozen=True)
class Work:
    """What a call cannot do with less of."""

    bytes: float
    flop: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flop + other.flop)

    def __mul__(self, times: float) -> "Work":
        return Work(self.bytes * times, self.flop * times)


def inputs_bytes(K: int, V: int, item: int, shared: float = 1.0) -> float:
    """Return bytes of q, k, v, gate and beta a token-head; q and k are shared by 1 / `shared` value heads."""
    return (2 * K * shared + V + K + 1) * item


def forward_bytes(K: int = 128, V: int = 128, item: int = 2, shared: float = 1.0) -> float:
    """Return bytes of a forward a token-head: the inputs and o."""
    return inputs_bytes(K, V, item, shared) + V * item


def kept_bytes(K: int = 128, V: int = 128, item: int = 2, C: int = CHUNK) -> float:
    """Return bytes a token-head of what a forward keeps for its backward: scores, inverse, a state a chunk."""
    return 2 * C * item + K * V * item / C


def backward_bytes(K: int = 128, V: int = 128, item: int = 2, C: int = CHUNK, shared: float = 1.0) -> float:
    """Return bytes of a backward a token-head: inputs, what was kept, d_o; five gradients written."""
    return 2 * inputs_bytes(K, V, item, shared) + V * item + kept_bytes(K, V, item, C)


def training_bytes(K: int = 128, V: int = 128, item: int = 2, C: int = CHUNK, shared: float = 1.0) -> float:
    """Return bytes of forward and backward a token-head."""
    kept = kept_bytes(K, V, item, C)
    return forward_bytes(K, V, item, shared) + kept + backward_bytes(K, V, item, C, shared)


def forward_flop(K: int = 128, V: int = 128, C: int = CHUNK) -> float:
    """Return operations of a forward a token-head, chunks of C in the solve form."""
    scores, inverse, solve = 4 * C * K, 2 * C * C / 3, 2 * C * V
    state, output = 6 * K * V, 2 * C * V
    return scores + inverse + solve + state + output


def backward_flop(K: int = 128, V: int = 128, C: int = CHUNK) -> float:
    """Return operations of a backward a token-head in the short form, the states recomputed."""
    products, scores, states = 8 * C * V, 8 * C * K, 12 * K * V
    recomputed = 4 * K * V + 2 * C * V
    return products + scores + states + recomputed


def decode_bytes(K: int = 128, V: int = 128, item: int = 2, state_item: int = 4) -> float:
    """Return bytes of a decoded token a state-head: its state read and written, the vectors."""
    return 2 * K * V * state_item + forward_bytes(K, V, item)


def decode_flop(K: int = 128, V: int = 128) -> float:
    """Return operations of a decoded token a state-head."""
    return 7 * K * V
