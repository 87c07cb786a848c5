import pytest
import torch

from kimi_linear.base.errors import KimiLinearError, ShapeError
from kimi_linear.inference.prompts import pad_left, read_prompts


@pytest.mark.parametrize(
    "given",
    [
        torch.tensor([1, 2, 3]),
        torch.tensor([[1, 2, 3]]),
        torch.tensor([[1, 2, 3]], dtype=torch.int32),
        [1, 2, 3],
        (1, 2, 3),
        [[1, 2, 3]],
    ],
)
def test_one_row_in_every_form(given):
    assert read_prompts(given, None, 10) == [[1, 2, 3]]


def test_padding_on_either_side_is_removed():
    ids = torch.tensor([[0, 0, 5], [6, 7, 0], [1, 2, 3]])
    mask = torch.tensor([[0, 0, 1], [1, 1, 0], [1, 1, 1]])
    assert read_prompts(ids, mask, 10) == [[5], [6, 7], [1, 2, 3]]
    assert read_prompts(ids, mask.bool(), 10) == [[5], [6, 7], [1, 2, 3]]
    assert read_prompts([[5], [6, 7], [1, 2, 3]], None, 10) == [[5], [6, 7], [1, 2, 3]]


def test_rows_are_padded_on_the_left():
    ids, mask = pad_left([[5], [6, 7, 8]], fill=9)
    assert ids.tolist() == [[9, 9, 5], [6, 7, 8]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    ("given", "mask", "message"),
    [
        ([], None, "no rows"),
        (torch.zeros(0, 3, dtype=torch.long), None, "no rows"),
        ([[1], []], None, "prompt 1 is empty"),
        (torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 1], [0, 0]]), "prompt 1 is empty"),
        (torch.zeros(1, 2), None, "expected integers"),
        (torch.zeros(1, 2, dtype=torch.bool), None, "expected integers"),
        (torch.zeros(1, 1, 2, dtype=torch.long), None, r"expected integers \[B, T\]"),
        (torch.tensor([[1, 2]]), torch.tensor([[1]]), r"expected the shape of input_ids, \[1, 2\]"),
        (torch.tensor([[1, 2]]), torch.tensor([[1, 2]]), "other than 0 and 1"),
        ([[1, 2]], torch.tensor([[1, 1]]), "leave it out with lists"),
        ("text", None, "encode the text first"),
        (["text"], None, "encode the text first"),
        ([[1, 2.0]], None, "expected a list of token ids"),
        ([[True]], None, "expected a list of token ids"),
    ],
)
def test_what_is_no_prompt(given, mask, message):
    with pytest.raises(ShapeError, match=message):
        read_prompts(given, mask, 10)


@pytest.mark.parametrize("token", [-1, 10])
def test_a_token_outside_the_vocabulary(token):
    with pytest.raises(KimiLinearError, match=rf"prompt 1 holds token {token}, expected tokens from 0 to 9"):
        read_prompts([[1], [2, token]], None, 10)
