"""Text that UTF-8 can hold."""

from kimi_linear.base.errors import DataError


def check_unicode(text: str, what: str = "the text") -> None:
    """Raise DataError for a lone surrogate.

    Example:
        >>> check_unicode("naïve")
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} holds a lone surrogate (U+{ord(text[error.start]):04X}), which is no character; remove it."
        ) from error
