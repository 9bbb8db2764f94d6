"""Jinja templates of others, with what transformers gives them: sandboxed, bounded in time and in what they write.

The sandbox keeps a template from the machine, not from looping or from doubling a text forty times.
"""

from __future__ import annotations

import ctypes
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import TemplateError, TemplateRuntimeError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from megatron_retro.runtime.strict_json import json_text

SECONDS = 5.0
CHARACTERS = 1 << 24


class TemplateRunsOn(TemplateRuntimeError):
    """A template that takes too long or writes too much."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or f"it runs for more than {SECONDS:g} seconds")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """An environment whose values cannot outgrow the bound."""

    intercepted_binops = frozenset({"*", "**", "+"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        self.reply_mark = secrets.token_hex(16)  # nobody's text holds it
        self.filters |= {"_bounded": bounded, "tojson": _as_json}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The result of an operator, unless it is too large to be meant."""
        if operator == "*" and (isinstance(left, int) or isinstance(right, int)):
            size = max((len(value) for value in (left, right) if hasattr(value, "__len__")), default=0)
            times = max((abs(value) for value in (left, right) if isinstance(value, int)), default=0)
            bounded("", size * times)
        if operator == "**" and abs(right) > 64:
            raise TemplateRunsOn("it computes a power beyond 64")
        return bounded(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """The syntax tree with a bound around every joined text."""
        tree: nodes.Template = _BoundJoins().visit(super()._parse(source, name, filename))
        return tree


class _GenerationTag(Extension):
    """`{% generation %} ... {% endgeneration %}` holds what an assistant writes: it gets a mark on either side."""

    tags = {"generation"}  # noqa: RUF012  # as the library declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """A call that is given what stands between the tags."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

    def marked(self, caller: Callable[[], str]) -> str:
        """The reply between its marks."""
        mark: str = self.environment.reply_mark  # type: ignore[attr-defined]  # of `BoundedEnvironment`
        return f"{mark}{caller()}{mark}"


def _as_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers writes it: Jinja's own escapes what HTML would misread."""
    text = json_text(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    bounded(text)
    return text


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


class _BoundJoins(NodeTransformer):
    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(node, "_bounded", [], [], None, None, lineno=node.lineno)


def bounded(value: Any, size: int | None = None) -> Any:
    """The value, unless it is longer than any text or list of a template is meant to be."""
    length = size if size is not None else len(value) if hasattr(value, "__len__") else 0
    if length > CHARACTERS:
        raise TemplateRunsOn(f"it makes a value of {length:,} characters or items, more than {CHARACTERS:,}")
    return value


def rendered(template: Any, variables: dict[str, Any]) -> str:
    """What a template of a `BoundedEnvironment` writes."""
    parts, size = [], 0
    with _time_limit():
        for part in template.generate(**variables):
            size += len(part)
            bounded("", size)
            parts.append(part)
    return "".join(parts)


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raise `TemplateRunsOn` in this thread when the time is over; a loop that writes nothing is ended, too."""
    thread, lock, over = threading.get_ident(), threading.Lock(), threading.Event()

    def end() -> None:
        with lock:
            if not over.is_set():
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TemplateRunsOn))

    timer = threading.Timer(SECONDS, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            over.set()
        timer.cancel()
