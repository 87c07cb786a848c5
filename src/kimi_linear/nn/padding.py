"""Padded batches as packed ones: rows with holes become sequences end to end, and back."""

import dataclasses

import torch
from torch import Tensor

from kimi_linear.base.errors import ShapeError


@dataclasses.dataclass(frozen=True)
class Padding:
    """Where the real tokens of a padded batch [B, T] stand.

    Fields: `indices` [M], positions of the real tokens in the flattened batch; `cu_seqlens` [B + 1], their offsets by
    row; `shape`, (B, T).
    """

    indices: Tensor
    cu_seqlens: Tensor
    shape: tuple[int, int]

    @classmethod
    def from_mask(cls, mask: Tensor) -> "Padding":
        """Read a mask [B, T] of ones (or True) at real tokens and zeros elsewhere, in any pattern."""
        real = mask != 0
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ShapeError("attention_mask holds values other than 0 and 1; give 1 at real tokens, 0 at padding.")
        offsets = real.sum(dim=1).cumsum(dim=0)
        cu_seqlens = torch.cat([offsets.new_zeros(1), offsets]).to(torch.int32)
        return cls(real.flatten().nonzero().squeeze(1), cu_seqlens, (mask.shape[0], mask.shape[1]))

    def pack(self, x: Tensor) -> Tensor:
        """Return the real tokens of x [B, T, ...] as one packed row [1, M, ...]."""
        return x.flatten(0, 1).index_select(0, self.indices).unsqueeze(0)

    def unpack(self, packed: Tensor) -> Tensor:
        """Return packed [1, M, ...] at its places in [B, T, ...]; padding is zero."""
        flat = packed.new_zeros(self.shape[0] * self.shape[1], *packed.shape[2:])
        return flat.index_copy(0, self.indices, packed.squeeze(0)).unflatten(0, self.shape)


def last_positions(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index of each sequence's last token [N] and whether it has one [N]; an empty one gets index 0."""
    has_token = cu_seqlens[1:] > cu_seqlens[:-1]
    return torch.where(has_token, cu_seqlens[1:] - 1, 0).long(), has_token
