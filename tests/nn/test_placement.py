import pytest

from kimi_linear.base.errors import ConfigError
from kimi_linear.nn.placement import from_lists, hybrid, repeat, to_lists, with_dense_start

RELEASED = {
    "kda": [1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26],
    "mla": [4, 8, 12, 16, 20, 24, 27],
}


def test_the_hybrid_pattern_over_27_layers_is_the_released_placement() -> None:
    assert to_lists(hybrid(27)) == RELEASED


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 5, 16, 27, 28])
@pytest.mark.parametrize("ratio", [0, 1, 3])
def test_the_last_layer_is_full_attention_and_no_run_of_linear_layers_is_longer_than_the_ratio(
    num_layers: int, ratio: int
) -> None:
    layers = hybrid(num_layers, ratio=ratio)
    assert len(layers) == num_layers
    assert layers[-1] == "mla"
    assert max(len(run) for run in "".join(name[0] for name in layers).split("m")) <= ratio


def test_lists_and_names_are_inverse() -> None:
    assert to_lists(from_lists(RELEASED)) == RELEASED


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"kda": [0, 1], "mla": [2]}, "1-based"),
        ({"kda": [True, 2], "mla": [3]}, "layer True of 'kda': layer lists are 1-based"),
        ({"kda": [1, 2], "mla": [2]}, "both 'kda' and 'mla'"),
        ({"kda": [1, 4], "mla": [5]}, r"layers \[2, 3\] are in no list"),
        ({"kda": [], "mla": []}, "layers all are in no list"),
    ],
)
def test_lists_that_do_not_cover_every_layer_once_are_refused(lists: dict[str, list[int]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_lists(lists)


def test_a_pattern_is_repeated_and_cut() -> None:
    assert repeat(["a", "b", "b"], 7) == ("a", "b", "b", "a", "b", "b", "a")


def test_the_first_layers_are_marked_dense() -> None:
    assert with_dense_start(hybrid(4), 2) == ("kda_dense", "kda_dense", "kda", "mla")
    assert with_dense_start(hybrid(4), 0) == hybrid(4)


def test_impossible_sizes_are_refused() -> None:
    for call in (lambda: hybrid(0), lambda: repeat([], 3), lambda: with_dense_start(["kda"], 2)):
        with pytest.raises(ConfigError, match="expected"):
            call()
