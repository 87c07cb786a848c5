"""What each mixer remembers of a batch of sequences, under names, and the cache of a whole network.

One row a sequence; rows may hold different numbers of tokens. A recurrent state has a fixed size and is float32; a
token state keeps something of every token and grows by doubling. Every state can be copied (`fork`), reordered
(`select_rows`), written down as plain tensors and tags (`snapshot`) and read back (`restore`), which refuses another
layout: with K = V a transposed recurrent state would pass every shape check and corrupt silently.

Gradients do not flow through a state: it holds detached tensors. Lengths live on the host, so growing never waits for
the device. Letters as in the style of this package: N rows, H heads, HV value heads, K and V dims, R latent rank.
"""

from kimi_linear.nn.state.base import LayerState, Snapshot, check_state
from kimi_linear.nn.state.cache import Cache
from kimi_linear.nn.state.delta import DeltaState, GDNState, KDAState
from kimi_linear.nn.state.tokens import GQAState, History, MLAState, TokenState

__all__ = [
    "Cache",
    "DeltaState",
    "GDNState",
    "GQAState",
    "History",
    "KDAState",
    "LayerState",
    "MLAState",
    "Snapshot",
    "TokenState",
    "check_state",
]
