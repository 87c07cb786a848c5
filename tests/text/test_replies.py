"""Tool calls: what is rendered is parsed back, and only control tokens make a call."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_linear.base.errors import DataError
from kimi_linear.text.chat import ChatTemplate
from kimi_linear.text.messages import ToolCall
from kimi_linear.text.replies import Reply, parse_reply
from kimi_linear.text.tokenizer import Tokenizer
from support.released_text import released_tokenizer

TEMPLATE = ChatTemplate()
TOKENIZER = released_tokenizer()
SECTION = "<|tool_calls_section_begin|>{}<|tool_calls_section_end|>"
CALL = "<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
DONE = ToolCall("functions.f:0", "f", "{}")
NAMES = st.text(max_size=12) | st.sampled_from(["get_weather", "a.b:1", "<|tool_call_end|>", "<|tool_call_"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), max_size=3)


def parse(text: str) -> Reply:
    return parse_reply(TOKENIZER.encode(text, parse_special=True), TOKENIZER)


def rendered(message: dict[str, Any]) -> list[int]:
    """Return the tokens of an assistant's message behind the generation prompt, as the model would write them."""
    prompt = TEMPLATE.apply([{"role": "user", "content": ""}], TOKENIZER)
    whole = TEMPLATE.apply([{"role": "user", "content": ""}, message], TOKENIZER, add_generation_prompt=False)
    assert whole[: len(prompt)] == prompt
    return whole[len(prompt) :]


@settings(deadline=None, max_examples=150)
@given(NAMES, CALLS)
def test_rendered_calls_are_parsed_back(content: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
    made = [
        ToolCall(f"functions.{name}:{i}", name, json.dumps(arguments, ensure_ascii=False))
        for i, (name, arguments) in enumerate(calls)
    ]
    reply = parse_reply(rendered({"role": "assistant", "content": content, "tool_calls": made}), TOKENIZER)
    assert reply == Reply(content, tuple(made))
    # Arguments as an object, and no ids: the layout supplies them.
    bare = [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    assert parse_reply(rendered({"role": "assistant", "content": content, "tool_calls": bare}), TOKENIZER) == reply


def test_an_id_of_another_form_is_the_name() -> None:
    call = ToolCall("call_7f", "call_7f", "[]")
    assert parse_reply(rendered({"role": "assistant", "tool_calls": [call]}), TOKENIZER).tool_calls == (call,)


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        ("Hello", Reply("Hello")),
        ("Hello<|im_end|>never", Reply("Hello")),
        ("Hello[EOS]never", Reply("Hello")),
        ("a" + SECTION.format(CALL + CALL) + "b<|im_end|>", Reply("ab", (DONE, DONE))),
        (CALL, Reply("", (DONE,))),
        (SECTION.format(""), Reply("")),
        ("a<|im_middle|>b<|reserved_token_705|>", Reply("ab")),
        (SECTION.format("  ") + CALL.replace("{}", " {} \n"), Reply("  ", (DONE,))),
        # Cut off, or a broken layout: the call is there, as unfinished.
        (
            "a<|tool_calls_section_begin|><|tool_call_begin|>functions.f",
            Reply("a", (), (ToolCall(*["functions.f"] * 2, ""),)),
        ),
        (CALL + CALL[: -len("<|tool_call_end|>")], Reply("", (DONE,), (DONE,))),
        (CALL[: -len("<|tool_call_end|>")] + "<|im_end|>", Reply("", (), (DONE,))),
        (CALL[: -len("<|tool_call_end|>")] + CALL, Reply("", (DONE,), (DONE,))),
        (SECTION.format(CALL[: -len("<|tool_call_end|>")]) + "b", Reply("b", (), (DONE,))),
        ("<|tool_call_begin|>functions.f:0<|tool_call_end|>", Reply("", (ToolCall("functions.f:0", "f", ""),))),
        ("a<|tool_call_end|>b<|tool_call_argument_begin|>c", Reply("abc")),
        (CALL.replace("{}", "{}<|tool_call_argument_begin|>"), Reply("", (DONE,))),
    ],
)
def test_every_form_of_a_reply(text: str, reply: Reply) -> None:
    assert parse(text) == reply


def test_letters_make_no_call() -> None:
    text = SECTION.format(CALL)
    assert parse_reply(TOKENIZER.encode(text), TOKENIZER) == Reply(text)


def test_a_tokenizer_without_tool_tokens_has_replies_of_text() -> None:
    tokenizer = Tokenizer.train(["a"], vocab_size=257)
    assert parse_reply([*tokenizer.encode("Hi"), tokenizer.eos_id, 5], tokenizer) == Reply("Hi")


def test_an_unknown_id_is_refused() -> None:
    with pytest.raises(DataError, match="outside the vocabulary"):
        parse_reply([10**6], TOKENIZER)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.sampled_from(sorted(TOKENIZER.control_ids.values())[:20]) | st.integers(0, TOKENIZER.vocab_size - 1))
)
def test_any_tokens_are_a_reply(ids: list[int]) -> None:
    reply = parse_reply(ids, TOKENIZER)
    begun = [id for id in ids if id == TOKENIZER.control_ids["<|tool_call_begin|>"]]
    assert len(reply.tool_calls) + len(reply.unfinished) <= len(begun)
