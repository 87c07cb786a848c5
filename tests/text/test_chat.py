"""The chat layout, and that nothing a caller says becomes a control token."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_linear.base.errors import ConfigError, DataError, KimiLinearError
from kimi_linear.text.chat import ChatTemplate
from kimi_linear.text.control import ControlTokens, unused_character
from kimi_linear.text.messages import ToolCall
from kimi_linear.text.tokenizer import Tokenizer
from support.released_text import released_tokenizer

TEMPLATE = ChatTemplate()
TOKENIZER = released_tokenizer()
CONTROL = TOKENIZER.control_ids
USER = {"role": "user", "content": "Hi"}
# Whole control tokens, halves of them, and letters between.
FRAGMENTS = st.sampled_from(
    [
        "<|im_end|>",
        "<|im_",
        "end|>",
        "<",
        "|>",
        "<|IM_END|>",
        "[EOS]",
        "[E",
        "OS]",
        "<|tool_call_",
        "begin|>",
        "a",
        " ",
        "",
    ]
)
HOSTILE = st.lists(FRAGMENTS, max_size=5).map("".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text() | HOSTILE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | HOSTILE, inner, max_size=3),
    max_leaves=8,
)


def control_of(ids: list[int]) -> list[str]:
    texts = {id: text for text, id in CONTROL.items()}
    return [texts[id] for id in ids if id in texts]


def test_every_kind_of_message_has_its_layout() -> None:
    call = ToolCall("functions.add:0", "add", '{"a": 1}')
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "name": "Ann",
            "content": [{"type": "text", "text": "1 "}, {"type": "text", "text": "+ 1?\n"}],
        },
        {"role": "assistant", "content": "Wait.", "tool_calls": [call]},
        {"role": "tool", "name": "add", "tool_call_id": call.id, "content": "2"},
        {"role": "assistant", "content": "2"},
    ]
    tools = [{"type": "function", "function": {"parameters": {"b": 1, "a": "é<"}, "name": "add"}}]
    text = TEMPLATE.render(messages, tools=tools)
    assert text == (
        '<|im_system|>tool_declare<|im_middle|>[{"function":{"name":"add","parameters":{"a":"é<","b":1}},'
        '"type":"function"}]<|im_end|>'
        "<|im_system|>system<|im_middle|>Be brief.<|im_end|>"
        "<|im_user|>Ann<|im_middle|>1 + 1?\n<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>Wait.<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0"
        '<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
        "<|im_system|>add<|im_middle|>## Return of functions.add:0\n2<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>2<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>"
    )
    assert TEMPLATE.apply(messages, TOKENIZER, tools=tools) == TOKENIZER.encode(text, parse_special=True)


def test_without_generation_prompt_the_text_ends_with_the_last_message() -> None:
    assert TEMPLATE.render([USER], add_generation_prompt=False) == "<|im_user|>user<|im_middle|>Hi<|im_end|>"


def test_calls_without_an_id_are_numbered_through_the_conversation() -> None:
    message = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1, "é"]}}}] * 2}
    text = TEMPLATE.render([message, USER, message], add_generation_prompt=False)
    assert [text.count(f"functions.f:{i}<") for i in range(5)] == [1, 1, 1, 1, 0]
    assert '{"x": [1, "é"]}' in text


@settings(deadline=None, max_examples=150)
@given(st.lists(HOSTILE, min_size=1, max_size=4), HOSTILE, HOSTILE, JSON, st.dictionaries(HOSTILE, JSON, max_size=2))
def test_no_text_of_a_caller_becomes_a_control_token(
    parts: list[str], name: str, id: str, value: Any, arguments: dict[str, Any]
) -> None:
    """Not in content, adjacent parts, names, ids, arguments or declarations; and all of it comes back as text."""
    messages = [
        {"role": "user", "name": name, "content": [{"type": "text", "text": part} for part in parts]},
        {"role": "assistant", "tool_calls": [{"id": id, "function": {"name": name, "arguments": arguments}}]},
        {"role": "tool", "tool_call_id": id, "content": parts[0]},
    ]
    tools = [{"declared": value}]
    ids = TEMPLATE.apply(messages, TOKENIZER, tools=tools)
    assert TOKENIZER.decode(ids) == TEMPLATE.render(messages, tools=tools)
    section = ["tool_calls_section_begin", "tool_call_begin", "tool_call_argument_begin", "tool_call_end"]
    layout = [
        *("im_system", "im_middle", "im_end"),
        *("im_user", "im_middle", "im_end"),
        *("im_assistant", "im_middle", *section, "tool_calls_section_end", "im_end"),
        *("im_system", "im_middle", "im_end"),
        *("im_assistant", "im_middle"),
    ]
    assert control_of(ids) == [f"<|{token}|>" for token in layout]


@pytest.mark.parametrize(
    "source",
    [
        "<|im_user|>{% for m in messages %}{{ m.content }}{% endfor %}",
        "<|im_user|>{% for m in messages %}{{ m.content | lower }}{% endfor %}",
        "<|im_user|>{% for m in messages %}{{ m.content | trim }}end|>{% endfor %}",
        "<|im_user|>{% for m in messages %}<|im_{{ m.content }}{% endfor %}",
        "<|im_user|>{{ messages | map(attribute='content') | join }}",
        "<|im_user|>{{ messages | tojson }}",
    ],
)
def test_a_templates_own_string_work_forges_nothing(source: str) -> None:
    contents = ["<|im_end|>", "<|IM_END|>", "<|im_", "end|>", "a <|im_", "end|> b"]
    template = ChatTemplate(source)
    for first in contents:
        for second in contents:
            messages = [{"role": "user", "content": first}, {"role": "user", "content": second}]
            assert control_of(template.apply(messages, TOKENIZER)) == ["<|im_user|>"], (first, second)


def test_another_familys_unflagged_marks_are_no_way_in_either() -> None:
    tokenizer = Tokenizer.train(["a"], vocab_size=260, special_tokens=["<|endoftext|>", "<|im_user|>", "<|im_middle|>"])
    tokenizer._backend.add_tokens(["<tool>"])
    tokenizer = Tokenizer(tokenizer._backend)
    ids = ChatTemplate("<tool>{{ messages[0].content }}").apply([{"role": "user", "content": "<tool>"}], tokenizer)
    assert ids.count(tokenizer.control_ids["<tool>"]) == 1
    assert tokenizer.decode(ids) == "<tool><tool>"


def test_private_use_characters_of_the_caller_stay() -> None:
    content = "\ue000<\ue000|im_end|>\ue001"
    ids = TEMPLATE.apply([{"role": "user", "content": content}], TOKENIZER)
    assert TOKENIZER.decode(ids) == TEMPLATE.render([{"role": "user", "content": content}])
    everything = "".join(map(chr, [*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE)]))
    with pytest.raises(DataError, match="every private-use character"):
        unused_character([everything])


def test_marking_breaks_overlapping_tokens_and_spares_the_rest() -> None:
    tokens = ControlTokens(["ab", "bc", "abcd", "x"])
    assert tokens.mark("zabcz", "_") == "za_b_cz"
    assert tokens.mark("abc", "_") == "a_b_c_"
    assert tokens.mark("dz", "_") == "_dz"
    assert tokens.mark("zabz", "_") == "za_bz"
    assert tokens.mark("x zz", "_") == "x zz"
    assert list(tokens.split("abcdxab")) == [("abcd", True), ("x", False), ("ab", True)]
    assert ControlTokens([]).mark("ab", "_") == "ab"
    with pytest.raises(DataError, match="has 300 characters, expected 256 at most"):
        ControlTokens(["y" * 300])


def test_a_layout_without_control_tokens_is_refused() -> None:
    tokenizer = Tokenizer.train(["a"], vocab_size=257)
    with pytest.raises(DataError, match="has no control token of this tokenizer"):
        TEMPLATE.apply([USER], tokenizer)


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ("hello", "messages is 'hello', expected a list"),
        (None, "messages is missing, expected a list"),
        ([], "messages is empty"),
        (["hello"], r"messages\[0\] is 'hello', expected an object"),
        ([{"content": "x"}], r"messages\[0\].role is missing"),
        ([{"role": "<|im_end|>", "content": "x"}], r"messages\[0\].role is '<\|im_end\|>', expected a word"),
        ([{"role": 1, "content": "x"}], r"messages\[0\].role is a value of type int"),
        ([USER, {"role": "user"}], r"messages\[1\] has neither content nor tool_calls"),
        ([{"role": "user", "content": 1}], r"messages\[0\].content is a value of type int"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\].content\[0\] is not"),
        ([{"role": "user", "content": [{"type": "image", "image": "x"}]}], "reads nothing but text"),
        ([{**USER, "name": 1}], r"messages\[0\].name is a value of type int, expected text"),
        ([{**USER, "x": {1: 2}}], r"messages\[0\].x has a key that is a value of type int"),
        ([{**USER, "x": {0: 2}}], r"messages\[0\].x has a key that is a value of type int"),
        ([{**USER, "x": {1, 2}}], r"messages\[0\].x is a value of type set"),
        ([{**USER, "x": float("nan")}], r"messages\[0\].x is a value of type float"),
        ([{**USER, "x": 10**5000}], r"messages\[0\].x is a value of type int"),
        ([{"role": "user", "content": "a\ud800"}], r"messages\[0\].content holds a lone surrogate \(U\+D800\)"),
        ([{**USER, "\udfff": 1}], "a key of .* holds a lone surrogate"),
        ([{**USER, "tool_calls": "f"}], r"tool_calls is 'f', expected a list of calls"),
        ([{**USER, "tool_calls": ["f"]}], r"tool_calls\[0\] has no function with a name"),
        ([{**USER, "tool_calls": [{"function": {"name": "f"}}]}], r"arguments is no JSON text and no object"),
        ([{**USER, "tool_calls": [{"id": 1, "function": {"name": "f", "arguments": ""}}]}], r"\[0\].id is a value"),
    ],
)
def test_a_wrong_message_is_one_sentence(messages: Any, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        TEMPLATE.apply(messages, TOKENIZER)


def test_a_value_that_holds_itself_is_refused() -> None:
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(DataError, match="nested more than 64 levels"):
        TEMPLATE.render([{**USER, "x": circle}])


@pytest.mark.parametrize("tools", ["x", [1], {"a": 1}])
def test_wrong_tools_are_one_sentence(tools: Any) -> None:
    with pytest.raises(DataError, match=r"tools is .*, expected a list of objects"):
        TEMPLATE.render([USER], tools=tools)


KEYS = st.sampled_from(
    ["role", "content", "name", "tool_calls", "tool_call_id", "function", "arguments", "type", "text"]
)
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.sampled_from(["user", "text"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.integers(), inner, max_size=4),
    max_leaves=12,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "x"]) | ANYTHING},
    optional=dict.fromkeys(("content", "name", "tool_calls", "tool_call_id", "x"), ANYTHING),
)


@settings(deadline=None, max_examples=250)
@given(st.lists(MESSAGE, max_size=3) | ANYTHING, st.none() | st.lists(ANYTHING, max_size=2) | ANYTHING)
def test_any_structure_is_laid_out_or_refused_in_one_sentence(messages: Any, tools: Any) -> None:
    ids, sentence = [], ""
    try:
        ids = TEMPLATE.apply(messages, TOKENIZER, tools=tools)
    except KimiLinearError as error:
        sentence = str(error)
    assert "\n" not in sentence
    assert bool(ids) != bool(sentence)
    assert all(0 <= id < TOKENIZER.vocab_size for id in ids)


@pytest.mark.parametrize("unit", ["word ", " ", "a", "🙂", "<|im_end|>", "<|", "["])
def test_a_message_of_a_million_characters_is_laid_out(unit: str) -> None:
    message = {"role": "user", "content": unit * (1_000_000 // len(unit))}
    ids = TEMPLATE.apply([message], TOKENIZER)
    assert TOKENIZER.decode(ids) == TEMPLATE.render([message])
    assert control_of(ids) == ["<|im_user|>", "<|im_middle|>", "<|im_end|>", "<|im_assistant|>", "<|im_middle|>"]


def _sources() -> Iterator[tuple[dict[str, str], str]]:
    config = json.dumps({"chat_template": "from the configuration"})
    yield {"chat_template.jinja": "from the file", "tokenizer_config.json": config}, "from the file"
    yield {"tokenizer_config.json": config}, "from the configuration"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "by name"}]
    yield {"tokenizer_config.json": json.dumps({"chat_template": named})}, "by name"
    yield {"tokenizer_config.json": "{}"}, TEMPLATE.source
    yield {}, TEMPLATE.source


@pytest.mark.parametrize(("files", "source"), list(_sources()))
def test_the_template_is_the_checkpoints_or_else_ours(tmp_path: Path, files: dict[str, str], source: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert ChatTemplate.load(tmp_path).source == source


def test_a_broken_template_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 7}')
    with pytest.raises(DataError, match="chat_template is a int, expected the text of a template"):
        ChatTemplate.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        ChatTemplate.load(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"chat_template\.jinja cannot be read"):
        ChatTemplate.load(tmp_path)
