"""What a user reads when a file of ours cannot be written."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kimi_linear.base.errors import DataError

_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a DataError that names the path and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DataError(
                f"{path} cannot be written: the disk is full; free space or choose another place."
            ) from error
        reason = error.strerror or str(error)
        raise DataError(f"{path} cannot be written: {reason}; choose a place that can be written to.") from error
