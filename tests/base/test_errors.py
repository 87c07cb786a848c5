import inspect

import pytest

from kimi_linear.base import errors

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__]


@pytest.mark.parametrize("error", CLASSES, ids=lambda c: c.__name__)
def test_every_error_is_ours_is_a_value_error_and_is_explained(error: type) -> None:
    assert issubclass(error, errors.KimiLinearError)
    assert issubclass(error, ValueError)
    assert error.__doc__
    assert error.__doc__ != errors.KimiLinearError.__doc__ or error is errors.KimiLinearError


def test_the_text_of_an_error_is_its_message() -> None:
    assert str(errors.ShapeError("q is [2], expected [3].")) == "q is [2], expected [3]."
