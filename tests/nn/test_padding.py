import pytest
import torch

from kimi_linear.base.errors import ShapeError
from kimi_linear.nn.padding import Padding, last_positions

MASK = torch.tensor([[0, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 1]])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32], ids=str)
def test_packing_keeps_the_real_tokens_in_order_and_unpacking_puts_them_back(dtype: torch.dtype) -> None:
    padding = Padding.from_mask(MASK.to(dtype))
    x = torch.arange(1, 25).view(4, 3, 2)
    packed = padding.pack(x)
    assert padding.cu_seqlens.tolist() == [0, 2, 4, 4, 7]
    assert packed[0, :, 0].tolist() == [3, 5, 7, 11, 19, 21, 23]
    assert torch.equal(padding.unpack(packed), x * MASK[..., None])


def test_a_mask_of_other_values_is_refused() -> None:
    with pytest.raises(ShapeError, match="other than 0 and 1"):
        Padding.from_mask(MASK - 1)


def test_the_last_position_of_an_empty_sequence_is_marked() -> None:
    last, has_token = last_positions(torch.tensor([0, 0, 2, 2, 7], dtype=torch.int32))
    assert last.tolist() == [0, 1, 0, 6]
    assert has_token.tolist() == [False, True, False, True]
