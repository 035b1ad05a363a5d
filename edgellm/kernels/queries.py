"""What attention does for some queries at once, so that they share what it loads: written once for any number."""

from __future__ import annotations

from types import FunctionType

from edgellm.kernels import Body, primitives

AT_ONCE = 1, 4, 8
"""Numbers of queries that primitives are there for."""


def for_each_number(body: Body) -> list[Body]:
    """The body for each of AT_ONCE: where it says name_n, that of name_1, name_4 or name_8 has it."""
    return [_for(body, n) for n in AT_ONCE]


def _for(body: Body, n: int) -> Body:
    names = tuple(name[:-1] + str(n) if name.endswith("_n") else name for name in body.__code__.co_names)
    code = body.__code__.replace(co_names=names, co_name=f"{body.__name__[:-1]}{n}")
    return FunctionType(code, {**vars(primitives), **body.__globals__}, code.co_name)
