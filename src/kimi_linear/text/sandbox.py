"""The process that renders one chat template: a program of its own, so that the system can bound its time and memory.

A template is code from a stranger. Jinja's sandbox keeps it from everything but the values it is given; a loop, a power
or a padded string can still take all time and memory, which only the operating system stops for certain. So the
template runs here, and `kimi_linear.text.worker` speaks with this process: one JSON value a line in, one a line out.
The first line holds the source and the limits; every further one the variables of a rendering.
"""

import json
import resource
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class GenerationTag(Extension):
    """`{% generation %}` marks what the assistant wrote, for training masks; rendering ignores the mark."""

    tags = {"generation"}  # noqa: RUF012 -- an attribute of the base class

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the body of the block."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class SafeNamespace(Namespace):
    """A namespace whose fields are no Python protocol: `__html__` for instance would be called outside the sandbox."""

    def __init__(self, **fields: object) -> None:
        for name in fields:
            _check_field(name)
        super().__init__(**fields)

    def __setitem__(self, name: str, value: object) -> None:
        """Set a field."""
        _check_field(name)
        super().__setitem__(name, value)


def _check_field(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have the field {name!r}")


def environment() -> ImmutableSandboxedEnvironment:
    """Return the environment that chat templates are written for: whitespace control, helper functions, no HTML."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag])
    env.filters["tojson"] = _to_json
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    env.globals["namespace"] = SafeNamespace
    return env


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def joined(parts: Iterable[str], most: int) -> str:
    """Return the text of a rendering, which may have `most` characters."""
    found = []
    for part in parts:
        most -= len(part)
        if most < 0:
            raise jinja2.exceptions.TemplateError("the text is too long")
        found.append(part)
    return "".join(found)


def main() -> None:
    """Answer lines until there are no more."""
    start = json.loads(sys.stdin.readline())
    with suppress(ValueError, OSError):  # macOS has no limit on the address space.
        resource.setrlimit(resource.RLIMIT_AS, (start["bytes"], start["bytes"]))

    def answer(text: str | None, error: BaseException | None) -> None:
        # Answering costs the template no time: the alarm is off.
        signal.setitimer(signal.ITIMER_PROF, 0)
        words = "" if error is None else f"{type(error).__name__}: {error}"
        print(json.dumps({"text": text, "error": words or None}), flush=True)

    # The process has no handler, so the alarm ends it. Constants are computed while the template is compiled.
    signal.setitimer(signal.ITIMER_PROF, start["seconds"])
    try:
        template = environment().from_string(start["source"])
    except Exception as error:  # Whatever a template manages to raise is its author's error.
        answer(None, error)
        return
    answer("", None)
    for line in sys.stdin:
        variables = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, start["seconds"])
        try:
            text = joined(template.generate(variables), start["characters"])
        except Exception as error:  # As above.
            answer(None, error)
        else:
            answer(text, None)


if __name__ == "__main__":
    main()
