"""Chat templates against transformers, and their bounds.  pytest tests/coordinator/text/test_chat_template.py"""

import os
import signal
import threading
import time
from datetime import datetime
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, models

from warmfront.coordinator.text.chat_template import CPU_S, render
from warmfront.shared.errors import ModelError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
MESSAGES = [
    {"role": "system", "content": "Brief & 'plain' <b>"},
    {"role": "user", "content": "Grüße 🌊 & <tags> it's\n\n"},
    {"role": "assistant", "content": " é "},
    {"role": "user", "content": ""},
]
TEMPLATES = {
    "date": "{{ strftime_now('%d %b %Y') }}{% if strftime_now is defined %} known{% endif %}",
    "json": "{{ messages | tojson }}",
    "json-keeps-the-order": "{{ {'b': 1, 'a': [none, true, 1.5]} | tojson }}",
    "json-sorted": "{{ {'b': 1, 'a': 'é'} | tojson(sort_keys=true, ensure_ascii=true) }}",
    "json-indented": "{{ {'b': [1, 'ü'], 'a': {}} | tojson(indent=4) }}|{{ [1, 2] | tojson(2 > 3, 1) }}",
    "json-compact": "{{ {'b': [1, 2]} | tojson(separators=(',', ':')) }}",
    "json-is-text": "{{ '<call>' + messages[1].content | tojson + '</call>' }}{{ '<' ~ ({'<': '&'} | tojson) }}",
    "tools": "{% if tools is none %}none{% endif %}{% if tools is defined %} defined{% endif %}{{ documents is none }}",
    "generation": (
        "{% for m in messages %}\n{%- if m.role == 'assistant' %}{% set x = 1 %}{%- generation -%} {{ m.content }}"
        "{% set x = 2 %}{%- endgeneration -%}{{ x }}{% else %}[{{ m.content }}]{% endif %}{% endfor %}"
    ),
    "loops": (
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ loop.index }}{{ loop.length }}"
        "{{ m.role }}{% if loop.revindex == 2 %}{% break %}{% endif %}{% endfor %}"
    ),
    "blocks": "  {% if true %}\n  a\n  {% endif %}\n{# b #}\n{{- messages | length }}\n",
    "special-tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}{{ add_generation_prompt }}",
    "namespace": (
        "{% set n = namespace(c=0) %}{% for m in messages if m.role == 'user' %}{% set n.c = n.c + 1 %}{% endfor %}"
        "{{ n.c }}{{ dict(a=n.c) }}{{ messages[::-1] | map(attribute='role') | join(',') }}"
    ),
    "macro": "{% macro m(x) %}<{{ x | trim }}>{% endmacro %}{{ m(messages[1].content) }}{{ messages[2].role.title() }}",
}
ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursion": (
        "{% for a in [[1, 1]] recursive %}{% if loop.depth < 60 %}{{ loop([[1, 1], [1, 1]]) }}{% endif %}{% endfor %}"
    ),
    "numbers": "{{ 10 ** (10 ** 8) }}",
}
LARGE = {
    "product": "{{ ('a' * 3000000000) | length }}",
    "format": "{{ '%3000000000d' % 1 }}",
    "filter": "{{ 'a' | center(3000000000) }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "output": "{% set x = 'a' * 1000000 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
    "prompt": "{{ 'a' * 70000000 }}",
}


def ours(template: str, messages: list[dict[str, str]] = MESSAGES) -> str:
    return render("model", template, messages, TOKENS)


@pytest.fixture(scope="module")
def theirs() -> Any:
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **TOKENS)
    return lambda template: fast.apply_chat_template(
        MESSAGES, chat_template=template, tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(theirs: Any, name: str) -> None:
    assert ours(TEMPLATES[name]) == theirs(TEMPLATES[name])


@pytest.mark.parametrize(
    "template",
    [
        "{{ call.arguments | tojson }}",
        "{{ '' + call.arguments }}",
        "{{ call.arguments }}",
        "{{ call.arguments ~ '' }}",
        '{"a": "{{ call.arguments.a }}"}',
        "{% for name, value in call.arguments.items() %}{{ {name: value} | tojson }}{% endfor %}",
        "{{ call.arguments if call.arguments is string else call.arguments | tojson }}",
    ],
)
def test_arguments_of_calls_are_objects_and_texts(template: str) -> None:
    calls = [{"function": {"name": "f", "arguments": {"a": "é"}}}]
    messages: list[Any] = [{"role": "assistant", "content": "", "tool_calls": calls}]
    assert ours("{% set call = messages[0].tool_calls[0].function %}" + template, messages) == '{"a": "é"}'


def test_a_message_that_is_calls_alone_has_no_text_and_an_empty_one() -> None:
    messages: list[Any] = [{"role": "assistant", "content": "", "tool_calls": []}] * 2
    messages[1] = {**messages[0], "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    asked = (
        "{{ [m.content is none, m['content'] is not none, 'x' in m.content, m.content + 'a', m.content is string] }}"
    )
    found = ours("{% for m in messages %}" + asked + "{% endfor %}", messages)
    assert found == "[False, True, False, 'a', True][True, False, False, 'a', True]"


def test_the_date_is_today() -> None:
    before = datetime.now()
    shown = datetime.fromisoformat(ours("{{ strftime_now('%Y-%m-%dT%H:%M:%S.%f') }}"))
    assert before <= shown <= datetime.now()


@pytest.mark.parametrize("name", ENDLESS)
def test_templates_that_do_not_end(name: str) -> None:
    before = os.times()
    with pytest.raises(ModelError, match=f"the chat template of model does not end within {CPU_S} s"):
        ours(ENDLESS[name])
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < CPU_S + 1.5


@pytest.mark.parametrize("name", LARGE)
def test_templates_that_take_all_memory(name: str) -> None:
    """On a slow machine the time limit may come first."""
    limits = rf"fails: it (needs more than \d+ MiB|writes [\d,]+ characters)|does not end within {CPU_S} s"
    with pytest.raises(ModelError, match=limits) as caught:
        ours(LARGE[name])
    assert "\n" not in str(caught.value)


def test_a_long_conversation_is_not_too_long() -> None:
    text = "warm front 🌊\n" * 300_000
    assert ours("{{ messages[0].content }}", [{"role": "user", "content": text}]) == text


def test_ctrl_c_ends_a_template() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            ours(ENDLESS["loops"])
        assert time.monotonic() - started < 0.9 + 0.5
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ strftime_now.__self__.year }}",
        "{{ messages.append(1) }}",
        "{% include 'x' %}",
    ],
)
def test_templates_reach_nothing_but_their_input(template: str) -> None:
    with pytest.raises(ModelError, match="the chat template of model fails: "):
        ours(template)
