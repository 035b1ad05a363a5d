"""Jinja for templates of strangers: they can neither reach out, nor run for ever, nor fill the memory.

Jinja's own sandbox keeps a template from reaching out. Here every loop, call, filter and operation is metered besides.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from functools import wraps
from types import BuiltinMethodType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from edgellm.errors import ChatTemplateError

MAX_SIZE = 1 << 24
"""Characters and elements of a value that a template makes, and of the rendered text."""
MAX_WORK = 1 << 28
"""Size times size of what one operation takes, where it multiplies them."""
MAX_STEPS = 500_000
"""Passes of loops, calls, elements of containers, and 200 characters each of strings."""
MAX_SECONDS = 3.0

# They search by regular expressions, or write what they find in ways of their own; no chat needs them.
_REMOVED_FILTERS = ("urlize", "wordwrap", "striptags", "xmlattr", "pprint", "random")
_MULTIPLYING = frozenset(
    {
        "batch",
        "center",
        "expandtabs",
        "indent",
        "join",
        "ljust",
        "replace",
        "rjust",
        "slice",
        "to_bytes",
        "tojson",
        "translate",
        "zfill",
    }
)
_WIDE = re.compile(r"\{[^{}]*(\{|\d{4})|%[^a-zA-Z%]*(\*|\d{4})")


class Meter:
    """What a rendering has used so far. Raises ChatTemplateError where that is too much."""

    def __init__(self) -> None:
        self._steps, self._end = 0, time.monotonic() + MAX_SECONDS

    def step(self, count: int = 1) -> None:
        self._steps += count
        if self._steps > MAX_STEPS or time.monotonic() > self._end:
            raise ChatTemplateError(
                f"the chat template takes more than {MAX_STEPS} steps or {MAX_SECONDS:.0f} s; "
                "expected it to come to an end: use another model, or generate"
            )

    def made(self, value: Any) -> Any:
        self.step(1 + self.size(value) // 200)
        return value

    def size(self, value: Any) -> int:
        """Characters and elements, all the way down: what is twice within a thing counts twice, as it prints twice."""
        total, elements, stack = 0, 0, [value]
        while stack:
            item = stack.pop()
            if isinstance(item, (str, bytes)):
                total += len(item)
            elif isinstance(item, Mapping):
                stack += [*item.keys(), *item.values()]
            elif isinstance(item, (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)):
                stack += item
            total, elements = total + 1, elements + 1
            if total > MAX_SIZE or elements + len(stack) > MAX_STEPS:
                self.refuse()
        self.step(elements)
        return total

    def work(self, *operands: Any) -> None:
        """For what multiplies its operands; a number is as large as what it can ask for."""
        if math.prod(sorted(map(self._factor, operands))[-2:]) > MAX_WORK:
            self.refuse()

    def _factor(self, operand: Any) -> int:
        if isinstance(operand, int):
            return max(1, abs(operand))
        # What they hold is not made yet, and is metered when it is.
        return MAX_RANGE if isinstance(operand, (Iterator, range)) else self.size(operand)

    def formats(self, template: str, operands: Iterable[Any]) -> None:
        """Each operand comes as often as it is named, and as wide as the template says."""
        if _WIDE.search(template):
            self.refuse()
        self.work(template.count("{") + template.count("%"), 1000 + sum(map(self.size, operands)))

    def refuse(self) -> None:
        raise ChatTemplateError(
            f"the chat template makes a value of more than {MAX_SIZE} characters, or asks for one; "
            "expected a chat: use another model, or generate"
        )


class Sandbox(ImmutableSandboxedEnvironment):
    """Metered by `meter`, which the caller renews for every rendering."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        self.meter = Meter()
        self.globals = {"range": self.globals["range"], "dict": dict, "namespace": _Namespace}
        filters = {**self.filters, "tojson": _tojson}
        self.filters = {
            name: self._metered(name, function) for name, function in filters.items() if name not in _REMOVED_FILTERS
        }

    def compiled(self, source: str) -> jinja2.Template:
        return self.from_string(_Metered().visit(self.parse(source)))

    # Named so that they hide no argument of a template's own.
    def call(_sandbox, _context: Any, _callee: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        _sandbox.meter.step()
        method = getattr(_callee, "__wrapped__", _callee)
        if isinstance(method, BuiltinMethodType):
            _sandbox._before(method.__name__, method.__self__, *args, *kwargs.values())
        return _sandbox.meter.made(super().call(_context, _callee, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            self.meter.formats(left, [right])
        elif isinstance(left, int) and isinstance(right, int):
            # Numbers of more than 65536 bits.
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            self.meter.work(bits, MAX_WORK >> 16)
        elif operator == "*":
            self.meter.work(left, right)
        return self.meter.made(super().call_binop(context, operator, left, right))

    def concat(self, parts: Iterable[str]) -> str:
        """What Jinja puts a template's output together with."""
        kept, size = list[str](), 0
        for part in parts:
            kept.append(part)
            size += len(part)
            if size > MAX_SIZE:
                self.meter.refuse()
        return "".join(kept)

    def join(self, *parts: Any) -> str:
        """For `~`."""
        return self.concat(map(str, parts))

    def same(self, value: Any = None) -> Any:
        """For what is metered by being called with it."""
        return value

    def _metered(self, name: str, function: Any) -> Any:
        skipped = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            self.meter.step()
            self._before(name, *args[skipped:], *kwargs.values())
            return self.meter.made(function(*args, **kwargs))

        return metered

    def _before(self, name: str, subject: Any = None, *operands: Any) -> None:
        if name in ("format", "format_map") and isinstance(subject, str):
            self.meter.formats(subject, operands)
        elif name in _MULTIPLYING:
            self.meter.work(subject, *operands)
        elif name == "round":
            # Ten to the power of its argument.
            self.meter.work(*operands, MAX_WORK >> 10)
        elif name == "sum" and any(isinstance(operand, (list, tuple)) for operand in operands):
            self.meter.refuse()


class _Metered(NodeTransformer):
    """Puts calls, which the sandbox meters, where Jinja has none: into loops, `~` and literals."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call(node, "same"), lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call(node, "join", *node.nodes)

    def _visit_literal(self, node: nodes.Literal) -> nodes.Node:
        self.generic_visit(node)
        return node if isinstance(node, nodes.Tuple) and node.ctx != "load" else _call(node, "same", node)

    visit_List = visit_Dict = visit_Tuple = _visit_literal  # noqa: N815


def _call(at: nodes.Node, name: str, *args: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None, lineno=at.lineno)


class _Namespace(Namespace):
    """Prints nothing of what it holds, as that is not measured together."""

    def __repr__(self) -> str:
        return "<namespace>"


class _Generation(Extension):
    """{% generation %}: marks, for trainers, what the model says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own writes for HTML: a model has never seen \u003c for <.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
