"""`kimi-linear chat`, and `generate` with tokenizers of the released kind, on a random model of a few layers."""

import contextlib
import io
import json
import subprocess
import sys
import unittest.mock
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kimi_linear.causal_lm import KimiLinearForCausalLM
from kimi_linear.cli import chat
from kimi_linear.cli.main import main
from kimi_linear.inference.params import SamplingParams
from kimi_linear.models.kimi_linear.presets import preset
from kimi_linear.text.chat import ChatTemplate
from kimi_linear.text.files import write_tokenizer_files
from kimi_linear.text.tokenizer import Tokenizer
from support.released_text import learned_ranks, released_tokenizer, write_release

TOKENIZER = released_tokenizer()
GREEDY = ("--temperature", "0", "--max-new-tokens", "6")


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run `main` in this process as the shell would: arguments, streams, exit code."""
    out, err = io.StringIO(), io.StringIO()
    patched = unittest.mock.patch.multiple(sys, argv=["kimi-linear", *arguments], stdin=io.StringIO(stdin))
    with patched, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as exit:
        main()
    return subprocess.CompletedProcess(arguments, int(exit.value.code or 0), out.getvalue(), err.getvalue())


def make_model() -> KimiLinearForCausalLM:
    config = replace(preset("tiny"), vocab_size=TOKENIZER.vocab_size, eos_token_id=None)
    return KimiLinearForCausalLM(config, generator=torch.Generator().manual_seed(3)).eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("chat") / "model"
    make_model().save_pretrained(directory)
    write_tokenizer_files(TOKENIZER, ChatTemplate(), directory)
    return directory


def greedy(model: KimiLinearForCausalLM, ids: list[int], count: int = 6) -> str:
    """Return what the model answers, by its own `generate`."""
    output = model.generate([ids], max_new_tokens=count, temperature=0.0, stop_token_ids=TOKENIZER.end_ids)[0]
    new = [id for id in output[len(ids) :].tolist() if id not in TOKENIZER.end_ids]
    return TOKENIZER.decode(new)


def test_one_message_gets_the_models_answer(checkpoint: Path) -> None:
    done = run("chat", str(checkpoint), "--message", "Hi <|im_end|>", "--system", "S", *GREEDY)
    assert done.returncode == 0, done.stderr
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi <|im_end|>"}]
    assert done.stdout == greedy(make_model(), ChatTemplate().apply(messages, TOKENIZER)) + "\n"


def test_every_line_of_input_is_a_message_or_a_command(checkpoint: Path) -> None:
    lines = ["Hi", "", "/system S", "/reset", "Hi", "/sing", "/system", "/reset", "Hi", "/quit", "never"]
    done = run("chat", str(checkpoint), *GREEDY, stdin="".join(f"{line}\n" for line in lines))
    assert done.returncode == 0, done.stderr
    user = {"role": "user", "content": "Hi"}
    plain = greedy(make_model(), ChatTemplate().apply([user], TOKENIZER))
    told = greedy(make_model(), ChatTemplate().apply([{"role": "system", "content": "S"}, user], TOKENIZER))
    assert plain != told
    assert done.stdout == f"{plain}\n{told}\n{plain}\n"
    assert "unknown command /sing" in done.stderr


class Script:
    """A model that answers with given tokens, and keeps what it was asked."""

    def __init__(self, *answers: list[int]) -> None:
        self.end_token_ids = ()
        self.asked: list[tuple[list[int], Any]] = []
        self._answers = iter(answers)

    def new_cache(self, rows: int) -> list[str]:
        return ["a new one"]

    def stream(self, prompts: Any, params: SamplingParams, *, tokenizer: Tokenizer, cache: Any) -> Iterator[Any]:
        self.asked.append((prompts[0], cache))
        for id in next(self._answers):
            if id < 0:
                raise KeyboardInterrupt
            text = "" if id in (params.stop_token_ids or ()) else tokenizer.decode([id])
            yield unittest.mock.Mock(token_id=id, text=text)


def conversation(*answers: list[int]) -> tuple[chat.Conversation, Script]:
    model = Script(*answers)
    return chat.Conversation(model, TOKENIZER, ChatTemplate(), SamplingParams()), model  # type: ignore[arg-type]


def test_the_next_turn_reads_only_what_the_cache_has_not_seen() -> None:
    end, a, b = TOKENIZER.control_ids["<|im_end|>"], *TOKENIZER.encode("ab")
    talk, model = conversation([a, end], [b, end])
    assert "".join(talk.send("Hi")) == "a"
    assert "".join(talk.send("Ho")) == "b"
    first = ChatTemplate().apply([{"role": "user", "content": "Hi"}], TOKENIZER)
    assert model.asked[0][0] == first
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "Ho"},
    ]
    whole = ChatTemplate().apply(turns, TOKENIZER)
    assert [*first, a, *model.asked[1][0]] == whole
    assert model.asked[0][1] is model.asked[1][1]


def test_a_turn_that_the_cache_is_no_beginning_of_starts_anew() -> None:
    """Here the model wrote "the" letter by letter, and the layout writes it as one token."""
    letters = [TOKENIZER.encode(letter)[0] for letter in "the"]
    assert TOKENIZER.encode("the") != letters
    talk, model = conversation([*letters, letters[0]], [letters[0]])
    list(talk.send("Hi"))
    list(talk.send("Ho"))
    assert model.asked[1][0][:1] == [TOKENIZER.control_ids["<|im_user|>"]]
    assert model.asked[0][1] is not model.asked[1][1]


def test_an_answer_that_is_broken_off_is_remembered_without_its_cache() -> None:
    a = TOKENIZER.encode("a")[0]
    talk, model = conversation([a, -1], [a])
    with pytest.raises(KeyboardInterrupt):
        list(talk.send("Hi"))
    list(talk.send("Ho"))
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "Ho"},
    ]
    assert model.asked[1][0] == ChatTemplate().apply(turns, TOKENIZER)
    assert model.asked[0][1] is not model.asked[1][1]


def test_generate_reads_a_directory_in_the_released_format(checkpoint: Path, tmp_path: Path) -> None:
    """The two ids behind the model's rows are cut off, and nothing is put before the prompt."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    write_release(tmp_path)
    assert len(learned_ranks()) + 256 == TOKENIZER.vocab_size
    done = run("generate", str(tmp_path), "--prompt", "Hi [EOS]", *GREEDY)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Hi [EOS]" + greedy(make_model(), TOKENIZER.encode("Hi [EOS]")) + "\n"


def test_generate_lays_a_message_out_when_asked(checkpoint: Path) -> None:
    chatted = run("generate", str(checkpoint), "--chat", "--prompt", "Hi", *GREEDY)
    assert chatted.stdout == run("chat", str(checkpoint), "--message", "Hi", *GREEDY).stdout


def test_every_end_token_of_the_tokenizer_ends_the_output(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[SamplingParams] = []
    stream = KimiLinearForCausalLM.stream

    def spy(self: KimiLinearForCausalLM, ids: Any, params: SamplingParams, **options: Any) -> Any:
        asked.append(params)
        return stream(self, ids, params, **options)

    monkeypatch.setattr(KimiLinearForCausalLM, "stream", spy)
    run("generate", str(checkpoint), "--prompt", "Hi", *GREEDY)
    run("chat", str(checkpoint), "--message", "Hi", *GREEDY)
    ends = {TOKENIZER.control_ids[token] for token in ("<|im_end|>", "[EOS]", "[EOT]")}
    assert [set(params.stop_token_ids or ()) for params in asked] == [ends, ends]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tokenizer.json": None}, "tokenizer.json does not exist"),
        ({"tokenizer.json": "{}"}, "is not a tokenizer.json"),
        ({"chat_template.jinja": "{{"}, "the chat template cannot render"),
        ({"chat_template.jinja": "no tokens"}, "has no control token of this tokenizer"),
        ({"tokenizer_config.json": json.dumps({"eos_token": "x"})}, "no special token 'x'"),
    ],
)
def test_a_checkpoint_that_cannot_chat_is_one_sentence(
    checkpoint: Path, tmp_path: Path, change: dict[str, str | None], sentence: str
) -> None:
    for file in checkpoint.iterdir():
        text = change.get(file.name, "")
        if text is not None:
            (tmp_path / file.name).write_bytes(text.encode() or file.read_bytes())
    done = run("chat", str(tmp_path), "--message", "Hi")
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_terminal_is_asked_line_by_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = iter(["one", "two"])

    def enter(prompt: str) -> str:
        assert prompt == "> "
        with contextlib.suppress(StopIteration):
            return next(lines)
        raise EOFError

    monkeypatch.setattr("builtins.input", enter)
    monkeypatch.setattr(sys, "stdin", unittest.mock.Mock(isatty=lambda: True))
    assert list(chat._lines()) == ["one", "two"]


def test_ctrl_c_at_a_terminal_ends_the_answer_and_not_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    a = TOKENIZER.encode("a")[0]
    talk, _ = conversation([a, -1], [a, -1])
    monkeypatch.setattr(sys, "stdin", unittest.mock.Mock(isatty=lambda: True))
    chat._answer(talk, "Hi")
    monkeypatch.setattr(sys, "stdin", unittest.mock.Mock(isatty=lambda: False))
    with pytest.raises(KeyboardInterrupt):
        chat._answer(talk, "Hi")
