"""Readers of text files, one a format. Each yields documents; what cannot be read is a DataError with path and line.

`.txt` is one document, `.jsonl` one document a line, `.parquet` one a row; the last two are streamed. Documents
without any character but white space are skipped: there is nothing in them to learn.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kimi_linear.base.errors import DataError


def read_txt(path: Path, text_field: str) -> Iterator[str]:
    """Yield the whole of a UTF-8 file as one document, exactly as it is (a byte order mark aside)."""
    del text_field  # A text file has no fields; the readers share one signature.
    with _explain_read_errors(path):
        content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 ({error.reason}); convert the file to UTF-8.") from error
    if text.strip():
        yield text


def read_jsonl(path: Path, text_field: str) -> Iterator[str]:
    """Yield the text field of the object on each line; empty lines are skipped."""
    with _explain_read_errors(path), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                text = _text_of_line(line, text_field, f"{path}, line {number}")
                if text.strip():
                    yield text


def read_parquet(path: Path, text_field: str) -> Iterator[str]:
    """Yield a column of strings, row by row; needs pyarrow, which is imported here and nowhere else."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{path} needs pyarrow, which cannot be imported ({error}); run pip install 'kimi-linear[train]'."
        ) from error
    try:
        with _explain_read_errors(path), pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_field not in columns:
                raise DataError(f"{path} has no column {text_field!r}; its columns are: {', '.join(columns)}.")
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    text = _checked_text(value, f"column {text_field!r}", f"{path}, row {row}")
                    if text.strip():
                        yield text
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable parquet file: {_first_line(error)}; write it again.") from error


READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": read_txt,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}


def _text_of_line(line: bytes, text_field: str, where: str) -> str:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error.reason}); convert the file to UTF-8.") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}); expected one object a line.") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: a JSON {type(record).__name__}, expected an object with the field {text_field!r}.")
    if text_field not in record:
        fields = ", ".join(map(repr, record)) or "none"
        raise DataError(f"{where}: no field {text_field!r} (fields: {fields}); name the field that holds the text.")
    return _checked_text(record[text_field], f"field {text_field!r}", where)


def _checked_text(value: Any, what: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {what} is {type(value).__name__}, expected a string.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {what} holds a lone surrogate, which is no character; remove it.") from error
    return value


def _first_line(error: Exception) -> str:
    """Return the first line of a message; pyarrow's may have several."""
    return str(error).split("\n")[0].rstrip(".")


@contextmanager
def _explain_read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or _first_line(error)}.") from error
