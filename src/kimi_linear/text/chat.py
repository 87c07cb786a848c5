"""The chat layout: a conversation to text through the checkpoint's Jinja template, and to tokens without forgeries."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from kimi_linear.base.config import read_json
from kimi_linear.base.errors import DataError
from kimi_linear.text.control import ControlTokens, unused_character
from kimi_linear.text.messages import read_messages, read_tools
from kimi_linear.text.tokenizer import Tokenizer
from kimi_linear.text.worker import Limits, TemplateWorker

TEMPLATE_NAME = "chat_template.jinja"


class ChatTemplate:
    """A Jinja template that lays out conversations.

    It runs sandboxed, in a process of its own with bounded time and memory, so a checkpoint's template need not be
    trusted. Like in transformers it sees `messages`, `tools`, `add_generation_prompt` and the special tokens by name.

    Args:
        source: The template; default: the layout of the released model.
        limits: What one rendering may take.

    Example:
        >>> template = ChatTemplate()
        >>> template.render([{"role": "user", "content": "Hello!"}])
        '<|im_user|>user<|im_middle|>Hello!<|im_end|><|im_assistant|>assistant<|im_middle|>'
    """

    def __init__(self, source: str | None = None, limits: Limits | None = None) -> None:
        default = Path(__file__).with_name(TEMPLATE_NAME)
        self.source = default.read_text(encoding="utf-8") if source is None else source
        self._worker = TemplateWorker(self.source, limits or Limits())

    @classmethod
    def load(cls, directory: str | Path, limits: Limits | None = None) -> "ChatTemplate":
        """Return the template of a checkpoint: its chat_template.jinja, else the one in its tokenizer_config.json.

        A checkpoint that has neither gets the released layout.

        Raises:
            DataError: The file cannot be read, or what stands there is no template.
            ConfigError: tokenizer_config.json is not JSON.
        """
        file, config = Path(directory) / TEMPLATE_NAME, Path(directory) / "tokenizer_config.json"
        try:
            if file.is_file():
                return cls(file.read_text(encoding="utf-8"), limits)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read: {error}.") from error
        given = read_json(config).get("chat_template") if config.is_file() else None
        if isinstance(given, list):
            # Several templates by name; the one for ordinary use is called "default".
            named = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
            given = named.get("default")
        if given is not None and not isinstance(given, str):
            raise DataError(f"{config}: chat_template is a {type(given).__name__}, expected the text of a template.")
        return cls(given, limits)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        names: Mapping[str, str] | None = None,
    ) -> str:
        """Return the text of a conversation, for reading; `apply` makes the tokens for a model.

        Args:
            messages: Each an object with `role` and `content`, text or a list of `{"type": "text", "text": ...}`;
                optionally `name`, `tool_calls` (objects as in OpenAI's interface, or `ToolCall`), `tool_call_id`.
            tools: Declarations, objects with a JSON schema each; their keys are sorted.
            add_generation_prompt: End with the opening of the assistant's next message.
            names: Texts of `bos_token`, `eos_token` and so on, for templates that write them.

        Raises:
            DataError: A message is not as described, or the template fails or exceeds its limits.
        """
        return self._render(read_messages(messages), read_tools(tools), add_generation_prompt, names or {})

    def apply(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Return the tokens of a conversation.

        Only what the template itself writes becomes a control token. The same letters in a message's text, name or
        calls, or in a tool's declaration, are ordinary text, also where they are spread over neighbouring strings.

        Args:
            messages: As for `render`.
            tokenizer: That of the model.
            tools: As for `render`.
            add_generation_prompt: As for `render`.

        Raises:
            DataError: As for `render`; or the layout has no control token of this tokenizer, so that a message could
                not be told from text.

        Cost: besides encoding, some 0.2 ms; the first time also the start of a process, 0.2 s.
        """
        given, declared = read_messages(messages), read_tools(tools)
        control = _control_tokens(tuple(tokenizer.control_ids))
        mark = unused_character([given, declared, self.source])
        marked = [_mark_message(message, control, mark) for message in given]
        text = self._render(marked, control.mark_all(declared, mark), add_generation_prompt, tokenizer.names)
        parts = list(control.split(text))
        if not any(is_control for _, is_control in parts):
            raise DataError(
                "the chat layout has no control token of this tokenizer, so a message could not be told from text; "
                "use the tokenizer and the template of one chat model."
            )
        ids = [
            [tokenizer.control_ids[part]] if is_control else tokenizer.encode_plain(part.replace(mark, ""))
            for part, is_control in parts
        ]
        return list(chain.from_iterable(ids))

    def _render(self, messages: list, tools: list | None, add_generation_prompt: bool, names: Mapping[str, str]) -> str:
        given = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        return self._worker.render({**names, **given})


@lru_cache(maxsize=4)
def _control_tokens(tokens: tuple[str, ...]) -> ControlTokens:
    return ControlTokens(tokens)


def _mark_message(message: dict[str, Any], control: ControlTokens, mark: str) -> dict[str, Any]:
    """Return a message with its texts marked. Its role was checked, and templates compare it."""
    return {**control.mark_all(message, mark), "role": message["role"]}
