"""A chat template is a program: whatever it does, rendering ends soon, in bounded memory, with a text or one line."""

import time

import pytest

from lathe.common import bounded_jinja
from lathe.models.chat_template import ChatTemplate
from lathe.models.template_error import TemplateError

MESSAGES = [{"role": "user", "content": "Switch on the lamp."}, {"role": "assistant", "content": "on"}]


def template(text: str) -> ChatTemplate:
    return ChatTemplate(text=text, bos_token="<s>", eos_token="</s>", adds_bos=False)


FAILING = [
    "{{ 1/0 }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ range(1000000000)|list }}",
    "{{ 'x'.index('y') }}",
    '{{ "\\ud800" }}{{ messages[0].content }}',
    "{{ 'x'.encode('bogus') }}",
    "{{ messages[7].content.x.y }}",
    "{{ {}['x'].y }}",
    "{% for message in messages %}{% break %}",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{{ raise_exception('') }}",
    "{{ none() }}",
    "{% include 'other' %}",
]

# Each would take minutes or many gigabytes.
ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in 'x' * 9999 %}{% for b in 'x' * 9999 %}{% for c in 'x' * 9999 %}{% endfor %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999)|map('string') %}{% endfor %}{% endfor %}",
    "{{ 10**5000 }}",
    "{{ 9**99999999 }}",
    "{{ 'x' * 10**12 }}",
    "{{ [0] * 10**12 }}",
    "{% set ns = namespace(x='xx') %}{% for a in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='xx') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='xx') %}{% for a in range(60) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}"
    "{% endset %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for a in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='xx') %}{% for a in range(60) %}{% set ns.x = ns.x|replace('x', 'xx') %}{% endfor %}",
    "{% set ns = namespace(x='xx') %}{% for a in range(60) %}{% set ns.x = ns.x.replace('x', 'xx') %}{% endfor %}",
    "{% set a = 'x' * 9999999 %}{{ a.replace('x', a) }}",
    "{% set a = 'x' * 9999999 %}{{ a|replace('x', a) }}",
    "{% set a = 'x' * 9999999 %}{{ a.join(a) }}",
    "{% set a = 'x' * 9999999 %}{{ a|join(a) }}",
    "{% set a = 'x' * 9999999 %}{% for i in range(9999) %}{{ a }}{% endfor %}",
    "{{ 'x'|center(10**10) }}",
    "{{ 'x'.ljust(10**10) }}",
    "{{ ('\\n' * 999999)|indent(999999) }}",
    "{{ ('\\t' * 999999).expandtabs(999999) }}",
    "{{ '{:10000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**5) }}",
    "{{ '{:{0[0]}}'.format([10**5 * 10**5]) }}",
    "{{ '%010000000000d' % 1 }}",
    "{{ '%*d' % (10**5 * 10**5, 1) }}",
    "{{ '%010000000000d'|format(1) }}",
    "{{ messages|tojson(indent=999999) }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
]


@pytest.mark.parametrize("text", [*FAILING, *ENDLESS])
def test_a_template_that_fails_or_does_not_end_is_one_line(text, monkeypatch):
    monkeypatch.setattr(bounded_jinja, "MAX_SECONDS", 2.0)
    began = time.process_time()
    with pytest.raises(TemplateError) as caught:
        template(text).render(MESSAGES)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value) or caught.value.code == "template-syntax"
    assert time.process_time() - began < 6


def test_a_slow_template_is_ended_by_the_clock(monkeypatch):
    monkeypatch.setattr(bounded_jinja, "MAX_SECONDS", 0.2)
    with pytest.raises(TemplateError, match=r"0 s"):
        template("{% for a in range(99999) %}{{ ('x' * 99999).replace('x', '')|length }}{% endfor %}").render(MESSAGES)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{% endfor %}", "1/2False2/2True"),
        ("{% for m in messages|selectattr('role', 'equalto', 'user') %}{{ loop.last }}{{ m.content }}{% endfor %}",
         "TrueSwitch on the lamp."),
        ("{{ 'a' ~ 1 ~ none }} {{ 7 % 4 }} {{ 2 ** 8 }} {{ 'ab' * 2 }} {{ [1] + [2] }}", "a1None 3 256 abab [1, 2]"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% else %}none{% endfor %}", "a1"),
        ("{% for m in missing %}{% else %}none{% endfor %}", "none"),
        ("{{ {'b': [1, 'é']}|tojson }}{{ messages|length }}{{ ' x '|trim }}", '{"b": [1, "é"]}2x'),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}", "assistant"),
        ("{{ ['a', 'b']|join(', ') }}{{ 'a-b'|replace('-', '+') }}{{ 'x'|indent(2, true) }}", "a, ba+b  x"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
    ],
)  # fmt: skip
def test_within_the_limits_it_writes_what_transformers_writes(text, written):
    from transformers.utils.chat_template_utils import render_jinja_template

    [theirs], _ = render_jinja_template(conversations=[MESSAGES], chat_template=text, bos_token="<s>", eos_token="</s>")
    assert template(text).render(MESSAGES) == theirs == written
