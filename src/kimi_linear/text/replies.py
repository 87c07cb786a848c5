"""What the model answered: text and tool calls, read from its tokens, so that text cannot pass for a call."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from kimi_linear.text.messages import ToolCall
from kimi_linear.text.tokenizer import Tokenizer

_SECTION_BEGIN, _SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_CALL_BEGIN, _ARGUMENTS, _CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
_ID = re.compile(r"functions\.(.*):\d+", re.DOTALL)


@dataclass(frozen=True)
class Reply:
    """One answer of the model.

    Fields: `content`, its text; `tool_calls`, those that are complete; `unfinished`, calls that were begun and not
    ended, with what there is of them: the answer was cut off, or the model broke the layout.
    """

    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    unfinished: tuple[ToolCall, ...] = ()


def parse_reply(ids: Iterable[int], tokenizer: Tokenizer) -> Reply:
    """Return the text and the tool calls of an answer.

    Reads up to the first token that ends a turn. A call runs from its begin token to its end token; its name is the
    middle of an id like `functions.<name>:<index>`, or the whole of an id of another form. White space around ids and
    arguments is dropped. The arguments are not checked: they are what the model wrote.

    Raises:
        DataError: An id is not in the vocabulary.

    Example:
        >>> tokenizer = Tokenizer.train(["a"], vocab_size=257)
        >>> parse_reply(tokenizer.encode("Hello!"), tokenizer)
        Reply(content='Hello!', tool_calls=(), unfinished=())
    """
    marks = {tokenizer.control_ids[token]: token for token in _layout() if token in tokenizer.control_ids}
    ends = set(tokenizer.end_ids)
    content: list[int] = []
    calls: list[ToolCall] = []
    unfinished: list[ToolCall] = []
    # Tokens of the call being read: its id, then its arguments.
    call: list[list[int]] | None = None
    for id in ids:
        if id in ends:
            break
        mark = marks.get(id)
        if mark is None:
            (content if call is None else call[-1]).append(id)
        elif mark == _ARGUMENTS and call is not None and len(call) == 1:
            call.append([])
        elif mark != _ARGUMENTS:
            if call is not None:
                (calls if mark == _CALL_END else unfinished).append(_read_call(call, tokenizer))
            call = [[]] if mark == _CALL_BEGIN else None
    if call is not None:
        unfinished.append(_read_call(call, tokenizer))
    return Reply(tokenizer.decode(content, skip_special=True), tuple(calls), tuple(unfinished))


def _layout() -> tuple[str, ...]:
    return _SECTION_BEGIN, _SECTION_END, _CALL_BEGIN, _ARGUMENTS, _CALL_END


def _read_call(call: list[list[int]], tokenizer: Tokenizer) -> ToolCall:
    texts = [tokenizer.decode(part, skip_special=True).strip() for part in call]
    id, arguments = texts if len(texts) == 2 else (texts[0], "")
    match = _ID.fullmatch(id)
    return ToolCall(id, match.group(1) if match else id, arguments)
