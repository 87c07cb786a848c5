"""A hostile template gets nothing but an error: no way out, no hang, no memory. And what templates rely on is there."""

import json
import os
import signal
import threading
import time
from datetime import datetime
from typing import Any

import pytest

from kimi_linear.base.errors import DataError
from kimi_linear.text.chat import ChatTemplate
from kimi_linear.text.worker import Limits, TemplateWorker

SMALL = Limits(seconds=0.3, characters=1 << 20, bytes=1 << 28)
MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "Hi", "name": "n"}]


def render(source: str, limits: Limits = SMALL) -> str:
    return ChatTemplate(source, limits).render(
        MESSAGES, tools=[{"b": "<é>'", "a": [1, None]}], names={"eos_token": "E"}
    )


def refuse_if_empty(text: str) -> None:
    """Raise when a template got nothing of what it asked for: the sandbox shows some things as undefined."""
    if text in ("", "[]"):
        raise DataError("the chat template cannot render: it got nothing")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ joiner['__init__']['__globals__'] }}",
        "{{ (raise_exception | attr('__globals__')).sys }}",
        "{{ raise_exception.__globals__['sys'].exit() }}",
        "{{ tojson.__globals__.os }}",
        "{{ strftime_now.__globals__.os.system('id') }}",
        "{{ self._TemplateReference__context.environment.from_string('x') }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
        "{{ '%s' | format(1) | map('attr', '__class__') | list | first | attr('mro') }}",
        "{{ namespace(__html__=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{% include '/etc/passwd' %}",
        "{% extends 'x' %}",
        "{% import 'os' as os %}{{ os }}",
        "{{ range(10 ** 9) | list }}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ 'a'.center(10 ** 10) }}",
        "{{ '%10000000000d' % 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages | tojson(indent=10 ** 10) }}",
        "{{ raise_exception('no such role') }}",
        "{{ undefined.field }}",
        "{{ unclosed",
        "{% for x in messages %}",
        "{% for _ in range(99) %}{{ 'a' * 99999 }}{% endfor %}",
    ],
)
def test_what_a_template_may_not_do_is_one_sentence(source: str) -> None:
    with pytest.raises(DataError, match=r"the chat template (cannot render|was stopped)") as caught:
        refuse_if_empty(render(source))
    assert "\n" not in str(caught.value)
    assert "root:" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(9) recursive %}{{ loop(range(9)) if loop.depth < 99 }}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
        "{% set x = namespace(s='aa') %}{% for _ in range(99) %}{% set x.s = x.s ~ x.s %}{% endfor %}",
        "{{ lipsum(n=10 ** 8) }}",
        "{% set l = namespace(l=[1]) %}{% for _ in range(99) %}{% set l.l = l.l + l.l %}{% endfor %}",
    ],
)
def test_a_template_that_never_ends_is_stopped(source: str) -> None:
    start = time.monotonic()
    with pytest.raises(DataError, match=r"was stopped: it takes more than 0.3 s of processor time or 256 MiB|Memory"):
        render(source)
    # Wide: the limit is on processor time, and others use the machine too.
    assert time.monotonic() - start < 30


def test_memory_is_bounded_whatever_time_it_takes() -> None:
    with pytest.raises(DataError, match="MemoryError"):
        render("{{ ('a' * 10 ** 9) | length }}", Limits(seconds=60, bytes=1 << 28))


def test_a_rendering_that_is_broken_off_leaves_nothing_running() -> None:
    worker = TemplateWorker("{% for a in x %}{% for b in range(99999) %}{% endfor %}{% endfor %}", Limits(seconds=60))
    worker.render({"x": []})
    assert worker._process is not None
    assert worker._process.stdin is not None
    worker._process.stdin.write(json.dumps({"x": "a" * 10**6}) + "\n")
    start = time.monotonic()
    worker._forget()
    assert time.monotonic() - start < 30
    assert worker.render({"x": []}) == ""


def test_after_an_error_and_after_a_stop_the_template_works_again() -> None:
    source = (
        "{% set long = 9 ** 9 * messages | length %}"
        "{% if messages[0].content == 'hang' %}{{ 9 ** long }}{% elif messages[0].content %}{{ 1 // 0 }}{% endif %}ok"
    )
    template = ChatTemplate(source, SMALL)
    for content, sentence in (("hang", "was stopped"), ("fail", "ZeroDivisionError")):
        with pytest.raises(DataError, match=sentence):
            template.render([{"role": "user", "content": content}])
        assert template.render([{"role": "user", "content": ""}]) == "ok"


def test_templates_find_what_they_are_written_for() -> None:
    assert render("{{ tools | tojson }}") == """[{"a": [1, null], "b": "<é>'"}]"""
    assert render("{{ tools[0].a | tojson(indent=1, separators=(',', ':')) }}") == "[\n 1,\n null\n]"
    assert render("{{ 'é' | tojson(ensure_ascii=True) }}") == '"\\u00e9"'
    assert render("{{ strftime_now('%Y') }}") in {str(datetime.now().year + shift) for shift in (-1, 0)}
    assert render("  {% if true %}\nx\n  {% endif %}\ny") == "x\ny"
    loop = "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% if i > 3 %}{% break %}{% endif %}"
    assert render(loop + "{% endfor %}") == "0134"
    assert render("{% generation %}{{ eos_token }}{% endgeneration %}") == "E"
    assert render("{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}") == "2"
    assert render("{{ messages[0].content.split('i')[0] }}{{ add_generation_prompt }}") == "HTrue"
    assert render("{{ '<&' }}{{ no_such }}") == "<&"


def test_threads_take_turns() -> None:
    worker = TemplateWorker("{{ x * 1000 }}", Limits())
    found: dict[str, str] = {}
    threads = [threading.Thread(target=lambda c=c: found.update({c: worker.render({"x": c})})) for c in "abcdefgh"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {c: c * 1000 for c in "abcdefgh"}


def test_a_forked_process_has_its_own_worker() -> None:
    worker = TemplateWorker("{{ x }}", Limits())
    assert worker.render({"x": "parent"}) == "parent"
    assert worker._process is not None
    pid = worker._process.pid
    child = os.fork()
    if child == 0:
        os._exit(0 if worker.render({"x": "child"}) == "child" and worker._process.pid != pid else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert worker.render({"x": "still"}) == "still"


def test_the_process_ends_with_its_owner_and_outlives_an_interrupt() -> None:
    worker = TemplateWorker("{{ x }}", Limits())
    worker.render({"x": ""})
    assert worker._process is not None
    pid = worker._process.pid
    assert os.getpgid(pid) != os.getpgid(0)
    del worker
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
