"""What a call will do and allocate, from shapes alone: chunks, segments, tiles, and the rooms of its workspace.

The inputs may lie on the meta device. Between forward and backward a call keeps its inputs, and if asked to ("factors",
"states") what the preparation, or the chain too, has made of them.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kimi_linear.ops.delta_rule.triton.inputs import NOTHING, WEIGHED, Inputs
from kimi_linear.ops.delta_rule.triton.segments import segment_length
from kimi_linear.ops.delta_rule.triton.tiles import Tiles, tiles
from kimi_linear.ops.triton.launch import padded

# What a forward keeps for its backward beside the inputs: each holds what the one before it does.
KEEPS = ("inputs", "factors", "states")
# Every room starts at a multiple of this, so that loads may be wide.
ALIGNMENT = 256


@dataclass(frozen=True)
class Room:
    """One tensor of a workspace."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """The bytes it takes in the workspace."""
        return -(-self.elements * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT


Rooms = dict[str, Room]


@dataclass(frozen=True)
class Plan:
    """A call: its chunks and segments (counts bound them from above) and the tiles they are computed with."""

    inputs: Inputs
    tiles: Tiles
    HV: int
    K: int
    V: int
    # Channels of a key's tile.
    KP: int
    sequences: int
    chunks: int
    # Chunks of a segment and how many segments there are, both 0 where a sequence is one chain.
    segment: int
    segments: int

    @property
    def rows(self) -> int:
        """Programs of the kernels that work on every chunk of every value head."""
        return self.chunks * self.HV

    @property
    def erases(self) -> bool:
        """Whether there is an erase key."""
        return self.inputs.flags["ERASE"] != NOTHING

    @property
    def dtype(self) -> torch.dtype:
        """What a workspace holds: bfloat16 for half precision, as a chunk's decays leave float16's range."""
        return torch.float32 if self.inputs.value.dtype == torch.float32 else torch.bfloat16

    @functools.cached_property
    def factors(self) -> Rooms:
        """What the preparation writes: factors, scores and inverses."""
        C, rows = self.tiles.chunk, self.rows
        factor, square = Room((rows, C, self.KP), self.dtype), Room((rows, C, C), self.dtype)
        found = {"q": factor, "k": factor, "total": Room((rows, self.KP), torch.float32), "scores": square}
        return {**found, "erase": factor, "inverse": square} if self.erases else found

    @functools.cached_property
    def states(self) -> Rooms:
        """What the chain writes for the backward: the states entering the chunks, and R."""
        return {
            "states": Room((self.rows, self.K, self.V), self.dtype),
            "written": Room((self.rows, self.tiles.chunk, self.V), self.dtype),
        }

    def kept(self, keep: str) -> Rooms:
        """Return the rooms that a forward keeps for its backward."""
        return {"inputs": {}, "factors": self.factors, "states": {**self.factors, **self.states}}[keep]

    @functools.cached_property
    def maps(self) -> Rooms:
        """What the segments need: the maps A and B, and what enters them."""
        rows, (K, V) = self.segments * self.HV, (self.K, self.V)
        state = Room((rows, K, V), torch.float32)
        return {"gain": Room((rows, K, K), torch.float32), "offset": state, "entering": state} if rows else {}


def plan(inputs: Inputs, cu_seqlens: Tensor | None, B: int, T: int) -> Plan:
    """Plan a call of B sequences of T tokens, or of packed ones of T tokens in all."""
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chosen = tiles(inputs, T, N, cu_seqlens is not None)
    # The lengths of packed sequences are not known here: a bound.
    chunks = -(-T // chosen.chunk)
    (HV, V), K = inputs.value.shape[1:], inputs.q.shape[2]
    programs = N * HV * -(-V // chosen.chain_block)
    length = segment_length(programs, chunks)
    segments = -(-chunks // length) if length else 0
    if cu_seqlens is None:
        chunks, segments = B * chunks, B * segments
    else:
        chunks, segments = chunks + N, segments + N if length else 0
    return Plan(inputs, chosen, HV, K, V, padded(K), N, chunks, length, segments)


def total_bytes(rooms: Rooms) -> int:
    """Return the bytes of a workspace."""
    return sum(room.bytes for room in rooms.values())


def views(memory: Tensor, rooms: Rooms) -> dict[str, Tensor]:
    """Return the rooms of a workspace, uint8 [bytes], as tensors."""
    found, start = {}, 0
    for name, room in rooms.items():
        end = start + room.elements * room.dtype.itemsize
        found[name] = memory[start:end].view(room.dtype).view(room.shape)
        start += room.bytes
    return found


def kept_bytes(inputs: Inputs, cu_seqlens: Tensor | None, B: int, T: int, keep: str) -> int:
    """Return the bytes that a forward keeps for its backward beside the inputs."""
    return total_bytes(plan(inputs, cu_seqlens, B, T).kept(keep))


def workspace_bytes(inputs: Inputs, cu_seqlens: Tensor | None, B: int, T: int, keep: str = "inputs") -> tuple[int, int]:
    """Return the bytes that a forward and that a backward allocate beside results and the chunks' offsets.

    What a forward keeps counts as the forward's. README.md has the figures a token.
    """
    p = plan(inputs, cu_seqlens, B, T)
    kept, maps = p.kept(keep), total_bytes(p.maps)
    forward = total_bytes({**p.factors, **kept}) + maps
    backward = maps + total_bytes({name: room for name, room in {**p.factors, **p.states}.items() if name not in kept})
    return forward, backward + _gradient_bytes(p, keep)


def _gradient_bytes(p: Plan, keep: str) -> int:
    """Return the bytes of the backward's own tensors."""
    x, C, blocks = p.inputs, p.tiles.chunk, p.KP // p.tiles.key_block
    (tokens, HV), size = x.value.shape[:2], p.dtype.itemsize
    chunk = (p.K + C) * p.V * size + 4 * C
    if keep != "inputs":
        chunk += C * C * size * (2 if p.erases else 1)
    if x.raw:
        chunk += 8 * C + 4 * blocks + 4 * p.KP
    token = 0
    if x.beta is not None:
        token += 4 * (blocks + 1 if x.flags["ERASE"] == WEIGHED else 1)
    if x.flags["SCALAR"]:
        token += 4 * blocks
    for given, normed in ((x.q, x.raw), (x.k, x.raw), (x.erase, False)):
        if given is not None and (normed or given.shape[1] != HV):
            token += 4 * p.K
    return p.rows * chunk + tokens * HV * token
