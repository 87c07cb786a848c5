"""A conversation as the caller gives it: checked, and copied into plain JSON values that a template may read."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kimi_linear.base.errors import DataError
from kimi_linear.text.unicode import check_unicode

_MOST_NESTED = 64
_ROLE = re.compile(r"[A-Za-z0-9_-]{1,64}")
# Larger whole numbers are slow to write in decimal, and Python refuses to.
_MOST_BITS = 4096


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool by the model.

    Fields: `id`, in the released layout `functions.<name>:<index>`; `name` of the tool; `arguments`, the text that the
    model wrote, meant to be a JSON object.
    """

    id: str
    name: str
    arguments: str

    def to_message(self) -> dict[str, Any]:
        """Return the entry for the `tool_calls` of an assistant's message."""
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


def read_messages(messages: object) -> list[dict[str, Any]]:
    """Return a conversation as plain values.

    Raises:
        DataError: It is not a list of messages; says which message has what, and what was expected.
    """
    if not isinstance(messages, (list, tuple)):
        raise DataError(f"messages is {_kind(messages)}, expected a list of messages.")
    if not messages:
        raise DataError("messages is empty, expected at least one message.")
    return [_read_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def read_tools(tools: object) -> list[Any] | None:
    """Return tool declarations as plain values, every object sorted by its keys; None for none.

    Raises:
        DataError: It is not a list of objects.
    """
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"tools is {_kind(tools)}, expected a list of objects that declare one tool each.")
    return [_sorted(plain(tool, f"tools[{i}]")) for i, tool in enumerate(tools)]


def plain(value: object, where: str, depth: int = 0) -> Any:
    """Return a copy of a value in plain JSON types.

    Raises:
        DataError: It holds something else, a number that JSON has not, a lone surrogate, or itself.
    """
    if depth > _MOST_NESTED:
        raise DataError(f"{where} is nested more than {_MOST_NESTED} levels deep; make it flatter.")
    if isinstance(value, str):
        check_unicode(value, where)
        return str(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and value.bit_length() <= _MOST_BITS:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, ToolCall):
        return plain(value.to_message(), where, depth)
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        if others := [key for key in value if not isinstance(key, str)]:
            raise DataError(f"{where} has a key that is {_kind(others[0])}, expected text.")
        keys = [plain(key, f"a key of {where}") for key in value]
        return {key: plain(value[key], f"{where}.{key[:40]}", depth + 1) for key in keys}
    raise DataError(f"{where} is {_kind(value)}, expected text, a number, true, false, null, a list or an object.")


def _read_message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise DataError(f"{where} is {_kind(message)}, expected an object with role and content.")
    read = plain(message, where)
    role = read.get("role")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise DataError(f"{where}.role is {_kind(role)}, expected a word such as user, assistant, system or tool.")
    for key in ("name", "tool_call_id"):
        if not isinstance(read.get(key), (str, type(None))):
            raise DataError(f"{where}.{key} is {_kind(read[key])}, expected text.")
    _check_content(read.get("content"), f"{where}.content")
    _check_calls(read.get("tool_calls"), f"{where}.tool_calls")
    if read.get("content") is None and not read.get("tool_calls"):
        raise DataError(f"{where} has neither content nor tool_calls; give one.")
    return read


def _check_content(content: Any, where: str) -> None:
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise DataError(f"{where} is {_kind(content)}, expected text or a list of parts.")
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise DataError(f'{where}[{i}] is not {{"type": "text", "text": ...}}; this model reads nothing but text.')


def _check_calls(calls: Any, where: str) -> None:
    if calls is None:
        return
    if not isinstance(calls, list):
        raise DataError(f"{where} is {_kind(calls)}, expected a list of calls.")
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{where}[{i}] has no function with a name; give id, function.name, function.arguments.")
        if not isinstance(function.get("arguments"), (str, dict)):
            raise DataError(f"{where}[{i}].function.arguments is no JSON text and no object; give one of them.")
        if not isinstance(call.get("id"), (str, type(None))):
            raise DataError(f"{where}[{i}].id is {_kind(call['id'])}, expected text.")


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(item) for item in value] if isinstance(value, list) else value


def _kind(value: object) -> str:
    """Return what a value is, in the words of a message."""
    if value is None:
        return "missing"
    if isinstance(value, str):
        return repr(value[:40])
    return f"a value of type {type(value).__name__}"
