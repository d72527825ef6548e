"""Jinja with limits: a chat template is a program that comes with a model, and may loop for ever or fill the memory.

Steps, time, the size of every text and number that a template makes, and of what it writes are bounded. A template
that stays within the limits writes what transformers' own environment writes.
"""

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils.chat_template_utils import _compile_jinja_template

MAX_STEPS = 2_000_000  # passes of loops, and calls, in one rendering
MAX_SECONDS = 10.0  # of one rendering
MAX_LENGTH = 1 << 25  # characters of a text
MAX_ITEMS = 1 << 20  # of a list
MAX_BITS = 4_096  # of an integer
MAX_ARGUMENT = 1_000_000  # a number given to a function, such as a width
MAX_INDENT = 64  # of JSON

# In a format: a field of a million characters, or as wide as another value says.
_LONG_WIDTH = re.compile(r"\d{6,}|:[^{}]*\{|%[-+ #0]*\*")
_LOOP, _JOINED = "lathe_bounded_loop", "lathe_bounded_text"


class TemplateLimitError(jinja2.TemplateError):
    """A template that goes beyond the limits."""


class _Allowance(threading.local):
    steps = 0
    deadline = 0.0


_allowance = _Allowance()


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox that transformers renders in, with limits."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})
    concat = staticmethod(lambda parts: _join(parts))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, _LOOP, [], [], None, None, lineno=loop.lineno)
        _wrap_joined_texts(tree)
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right`, if the result is small enough."""
        if operator == "+":  # by far the most frequent
            joined = left + right
            if joined.__class__ is not str or len(joined) > MAX_LENGTH:
                _check_length(joined)
            return joined
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            if right > 0 and left.bit_length() * right > MAX_BITS:
                raise TemplateLimitError(f"it computes a number of more than {MAX_BITS} bits")
        elif operator == "*":
            _check_product(left, right)
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
        return _check_length(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return what is called for a text's `format`, with its width looked at before."""
        if (wrapped := super().wrap_str_format(value)) is None:
            return None
        text = value.__self__

        @wraps(wrapped)
        def checked(*arguments: Any, **options: Any) -> str:
            _check_format(text)
            return wrapped(*arguments, **options)

        return checked

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as in the base class
        """Call what a template calls, within the limits."""
        _count_steps(1)
        _check_arguments(getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None), args)
        return _check_length(super().call(__context, __obj, *args, **kwargs))


def compile_template(text: str) -> jinja2.Template:
    """Compile a chat template with the options, filters and functions of transformers. Raises TemplateSyntaxError."""
    theirs = _compile_jinja_template("").environment
    environment = BoundedEnvironment(
        trim_blocks=theirs.trim_blocks,
        lstrip_blocks=theirs.lstrip_blocks,
        extensions=[type(extension) for extension in theirs.extensions.values()],
    )
    environment.filters = {name: _bound_filter(name, function) for name, function in theirs.filters.items()}
    environment.filters[_LOOP] = _bound_loop
    environment.filters[_JOINED] = _check_length
    environment.globals = dict(theirs.globals)
    try:
        return environment.from_string(text)
    except RecursionError:
        raise jinja2.TemplateSyntaxError("it is nested too deep", 1) from None


def render(template: jinja2.Template, variables: dict[str, Any]) -> str:
    """Render within the limits. Raises TemplateLimitError beyond them, and whatever error the template itself has."""
    _allowance.steps, _allowance.deadline = MAX_STEPS, time.monotonic() + MAX_SECONDS
    # As transformers' render_jinja_template, without the copies that it makes of everything.
    context = template.new_context(variables, shared=True)
    return _join(template.root_render_func(context))


def _count_steps(count: int) -> None:
    _allowance.steps -= count
    if _allowance.steps < 0:
        raise TemplateLimitError(f"it takes more than {MAX_STEPS:,} steps for one conversation")
    if time.monotonic() > _allowance.deadline:
        raise TemplateLimitError(f"it takes more than {MAX_SECONDS:.0f} s for one conversation")


def _bound_loop(items: Any) -> Any:
    """Count the passes of a loop: at once where their number is known, else one by one."""
    if hasattr(items, "__len__"):
        _count_steps(1 + len(items))
        return items
    return _count_each(items)


def _count_each(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _count_steps(1)
        yield item


def _wrap_joined_texts(node: nodes.Node) -> None:
    """Check the length of what `a ~ b` makes."""
    for name, value in node.iter_fields():
        values = value if isinstance(value, list) else [value]
        for index, child in enumerate(values):
            if not isinstance(child, nodes.Node):
                continue
            _wrap_joined_texts(child)
            if isinstance(child, nodes.Concat):
                wrapped = nodes.Filter(child, _JOINED, [], [], None, None, lineno=child.lineno)
                if isinstance(value, list):
                    value[index] = wrapped
                else:
                    setattr(node, name, wrapped)


def _join(parts: Iterable[str]) -> str:
    total, kept = 0, []
    for part in parts:
        total += len(part)
        if total > MAX_LENGTH:
            raise TemplateLimitError(f"it writes more than {MAX_LENGTH:,} characters")
        kept.append(part)
    return "".join(kept)


def _check_length(value: Any) -> Any:
    if isinstance(value, (str, bytes)) and len(value) > MAX_LENGTH:
        raise TemplateLimitError(f"it makes a text of more than {MAX_LENGTH:,} characters")
    if isinstance(value, (list, tuple, dict)) and len(value) > MAX_ITEMS:
        raise TemplateLimitError(f"it makes a list of more than {MAX_ITEMS:,} items")
    return value


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > MAX_BITS:
        raise TemplateLimitError(f"it computes a number of more than {MAX_BITS} bits")
    for repeated, count in ((left, right), (right, left)):
        is_repetition = isinstance(repeated, (str, list, tuple, bytes)) and isinstance(count, int)
        most = MAX_LENGTH if isinstance(repeated, (str, bytes)) else MAX_ITEMS
        if is_repetition and len(repeated) * count > most:
            raise TemplateLimitError(f"it makes a value of more than {most:,} characters or items")


def _check_format(text: str) -> None:
    if _LONG_WIDTH.search(text):
        raise TemplateLimitError("it formats with a width of a million characters or more")


def _check_arguments(name: str, subject: Any, arguments: Sequence[Any]) -> None:
    """Refuse numbers and separators that make a text out of proportion, before it is made."""
    numbers = [abs(argument) for argument in arguments if isinstance(argument, int)]
    if numbers and max(numbers) > MAX_ARGUMENT:
        raise TemplateLimitError(f"it gives {name or 'a function'} a number above {MAX_ARGUMENT:,}")
    if not isinstance(subject, str):
        return
    texts = [argument for argument in arguments if isinstance(argument, str)]
    length = 0
    if numbers:  # a width, of every line or tab
        length = max(numbers) * (1 + subject.count("\n") + subject.count("\t"))
    elif name == "replace" and len(texts) > 1:
        length = (subject.count(texts[0]) if texts[0] else len(subject) + 1) * len(texts[1])
    elif name == "join" and arguments and hasattr(arguments[0], "__len__"):
        length = len(subject) * len(arguments[0])
    if length > MAX_LENGTH:
        raise TemplateLimitError(f"it makes a text of more than {MAX_LENGTH:,} characters")


def _bound_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    passed = 1 if hasattr(function, "jinja_pass_arg") else 0  # Jinja's own context, before the arguments

    @wraps(function)  # with the mark by which Jinja passes its context
    def bounded(*arguments: Any, **options: Any) -> Any:
        _count_steps(1)
        subject, *rest = arguments[passed:]
        rest += options.values()
        if name == "join":
            subject, rest = next((text for text in rest if isinstance(text, str)), ""), [subject]
        elif name == "format" and isinstance(subject, str):
            _check_format(subject)
        elif name == "tojson" and any(isinstance(number, int) and number > MAX_INDENT for number in rest):
            raise TemplateLimitError(f"it indents JSON by more than {MAX_INDENT}")
        _check_arguments(name, subject, rest)
        return _check_length(function(*arguments, **options))

    return bounded
