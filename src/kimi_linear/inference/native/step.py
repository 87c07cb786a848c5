"""One token a row through a whole network, in one native call.

Between two steps the weights have gone through every cache of the processor, so each Python object that a step touches
is a miss: what a step needs is kept ready, and little is looked at.
"""

import ctypes
import threading
import weakref

import torch
from torch import Tensor

from kimi_linear.inference.native import structs
from kimi_linear.inference.native.layers import Described
from kimi_linear.models.kimi_linear.config import KimiLinearConfig
from kimi_linear.nn.mixers import KDAConfig
from kimi_linear.nn.state import Cache, KDAState, MLAState
from kimi_linear.ops import native
from kimi_linear.ops.native.library import DTYPES

_BUFFERS = {KDAState: ("conv_q", "conv_k", "conv_v", "recurrent"), MLAState: ("latent", "key_rope")}


class Stepper:
    """Runs steps of a described network.

    Args:
        described: The network, by `describe_model`.
        config: Its configuration.
        dtype: Of its activations.
    """

    def __init__(self, described: Described, config: KimiLinearConfig, dtype: torch.dtype) -> None:
        self._vocab_size = config.vocab_size
        self._dtype = dtype
        states = (structs.LayerState * config.num_layers)()
        kinds = [KDAState if isinstance(block.mixer, KDAConfig) else MLAState for block in config.layer_blocks]
        self._layers = [_Pointers(struct, kind, dtype) for struct, kind in zip(states, kinds, strict=True)]
        self._call = structs.Call(states=ctypes.addressof(states), dtype=DTYPES[dtype])
        self._addresses = ctypes.addressof(described.struct), ctypes.addressof(self._call)
        self._kept = described, states
        self._run = native.kernel("engine_step", "pp")
        # Of the structs above, which every step fills.
        self._lock = threading.Lock()

    def __call__(self, input_ids: Tensor, cache: Cache) -> Tensor | None:
        """Return the logits [M, 1, V] behind one new token a row, input_ids [M, 1], and move the cache on.

        None, with nothing changed, if the call is another, or the cache not one of this network that can be written
        to in place.
        """
        with self._lock:
            return self._step(input_ids, cache)

    def _step(self, input_ids: Tensor, cache: Cache) -> Tensor | None:
        lengths, rows = cache.lengths, input_ids.shape[0]
        if (
            input_ids.shape != (rows, 1)
            or input_ids.dtype != torch.int64
            or lengths.shape[0] != rows
            or len(cache.layers) != len(self._layers)
        ):
            return None
        ids = input_ids.flatten().tolist()
        if not ids or min(ids) < 0 or max(ids) >= self._vocab_size:
            return None
        longest = max(lengths.tolist()) + 1
        for pointers, state in zip(self._layers, cache.layers, strict=True):
            if not pointers.follow(state, lengths, longest):
                return None
        tokens = input_ids.contiguous()
        logits = torch.empty(rows, 1, self._vocab_size, dtype=self._dtype)
        call = self._call
        call.tokens, call.lengths, call.logits = tokens.data_ptr(), lengths.data_ptr(), logits.data_ptr()
        call.rows = rows
        self._run(*self._addresses)
        cache.lengths = lengths = lengths + 1
        for state in cache.layers:
            if isinstance(state, MLAState):
                state.lengths = lengths
        return logits


class _Pointers:
    """Where the tensors of a layer's state lie, kept from step to step; they live only as long as their cache."""

    def __init__(self, struct: structs.LayerState, kind: type, dtype: torch.dtype) -> None:
        self.kind = kind
        self._struct = struct
        self._dtype = dtype
        self._names = _BUFFERS[kind]
        self._known: tuple[weakref.ref[Tensor], ...] = ()

    def follow(self, state: object, lengths: Tensor, longest: int) -> bool:
        """Point at the tensors of a state with those lengths, with room for `longest`; False if it does not fit."""
        if type(state) is not self.kind:
            return False
        if isinstance(state, MLAState):
            if state.lengths is not lengths and not torch.equal(state.lengths, lengths):
                return False
            if state.capacity < longest:
                state.reserve(longest)
        values = state.__dict__
        known = self._known
        if known and all(values[name] is tensor() for name, tensor in zip(self._names, known, strict=True)):
            return True
        return self._point(state, lengths.shape[0])

    def _point(self, state: object, rows: int) -> bool:
        self._known = ()
        tensors = tuple(getattr(state, name) for name in self._names)
        for name, tensor in zip(self._names, tensors, strict=True):
            expected = torch.float32 if name == "recurrent" else self._dtype
            if tensor.shape[0] != rows or tensor.dtype != expected or tensor.device.type != "cpu":
                return False
            if not tensor.is_contiguous():
                tensor = tensor.contiguous()
                setattr(state, name, tensor)
            setattr(self._struct, name, tensor.data_ptr())
        self._struct.capacity = tensors[0].shape[1]
        self._known = tuple(weakref.ref(getattr(state, name)) for name in self._names)
        return True
