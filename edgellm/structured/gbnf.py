"""GBNF, the grammars of llama.cpp: text -> rules, checked. Knows no tokens, and nothing of how a grammar is used."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NoReturn, TypeVar

from edgellm.errors import ArgumentError, UnsupportedError

MAX_LENGTH = 100_000
"""Characters of a grammar, and of the shortest text of each of its parts."""
MAX_DEPTH = 100
"""Parentheses in one another."""
MAX_REPEAT = 2000

LAST = 0x10FFFF
T = TypeVar("T")
Ranges = list[tuple[int, int]]


@dataclass(eq=False)
class Chars:
    """One character out of sorted ranges."""

    ranges: Ranges


@dataclass(eq=False)
class Ref:
    name: str
    place: int


@dataclass(eq=False)
class Seq:
    items: list[Node]


@dataclass(eq=False)
class Alt:
    items: list[Node]


@dataclass(eq=False)
class Repeat:
    item: Node
    least: int
    most: int | None


Node = Chars | Ref | Seq | Alt | Repeat


def parse(text: str) -> dict[str, Node]:
    """Name -> right side of each rule. Raises ArgumentError with line and column for what is wrong, for left recursion
    and for rules that never end; UnsupportedError for what is too large."""
    if len(text) > MAX_LENGTH:
        raise UnsupportedError(f"the grammar has {len(text)} characters; expected at most {MAX_LENGTH}")
    rules = _Parser(text).rules()
    _check(text, rules)
    return {name: side for name, (side, _) in rules.items()}


class _Parser:
    """Recursive descent over the text; `at` is the next character's place."""

    def __init__(self, text: str) -> None:
        self._text, self._at, self._depth = text, 0, 0

    def rules(self) -> dict[str, tuple[Node, int]]:
        """Name -> its right side, and its place."""
        rules: dict[str, tuple[Node, int]] = {}
        self._space(newlines=True)
        while self._at < len(self._text):
            place, name = self._at, self._name()
            if name in rules:
                self._fail(f"the rule {name!r} is there already", place)
            self._space()
            self._expect("::=")
            self._space(newlines=True)
            rules[name] = self._alternatives(nested=False), place
            if self._peek() not in ("\r", "\n", ""):
                self._fail("expected the end of the rule")
            self._space(newlines=True)
        return rules

    def _alternatives(self, nested: bool) -> Node:
        items = [self._sequence(nested)]
        while self._peek() == "|":
            self._at += 1
            self._space(newlines=True)
            items.append(self._sequence(nested))
        return items[0] if len(items) == 1 else Alt(items)

    def _sequence(self, nested: bool) -> Node:
        items: list[Node] = []
        while (item := self._item()) is not None:
            self._space(nested)
            items.append(self._repeated(item))
            self._space(nested)
        return items[0] if len(items) == 1 else Seq(items)

    def _item(self) -> Node | None:
        char = self._peek()
        if char == '"':
            return self._literal()
        if char == "[":
            return self._class()
        if char == "(":
            return self._group()
        if char == ".":
            self._at += 1
            return Chars(_characters([(0, LAST)]))
        if char in ("<", "!"):
            self._fail("a token is named; expected characters: tokens in grammars are not supported")
        return Ref(self._name(), self._at) if _is_name(char) else None

    def _literal(self) -> Node:
        begin, items = self._at, list[Node]()
        self._at += 1
        while (char := self._peek()) != '"':
            if not char:
                self._fail("the text that begins here has no end", begin)
            items.append(Chars([(code := self._char(), code)]))
        self._at += 1
        return Seq(items)

    def _class(self) -> Node:
        begin, ranges = self._at, list[tuple[int, int]]()
        self._at += 1
        negated = self._peek() == "^"
        self._at += negated
        while (char := self._peek()) != "]":
            if not char:
                self._fail("the characters that begin here have no end", begin)
            first = last = self._char()
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                last = self._char()
            if last < first:
                self._fail("a range of characters goes backwards", begin)
            ranges.append((first, last))
        self._at += 1
        ranges = _characters(_inverse(_merged(ranges)) if negated else ranges)
        if not ranges:
            self._fail("there is no such character", begin)
        return Chars(ranges)

    def _group(self) -> Node:
        begin = self._at
        self._at += 1
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise UnsupportedError(f"the grammar is deeper than {MAX_DEPTH} parentheses at {self._where(begin)}")
        self._space(newlines=True)
        inner = self._alternatives(nested=True)
        if self._peek() != ")":
            self._fail("the parenthesis that begins here has no end", begin)
        self._at += 1
        self._depth -= 1
        return inner

    def _repeated(self, item: Node) -> Node:
        signs = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if sign := signs.get(self._peek()):
            self._at += 1
            return Repeat(item, *sign)
        if self._peek() != "{":
            return item
        match = re.compile(r"\{\s*(\d{1,9})\s*(,\s*(\d{0,9})\s*)?\}").match(self._text, self._at)
        if not match:
            self._fail("expected {n}, {n,} or {n,m}")
        least = int(match[1])
        most = least if match[2] is None else int(match[3]) if match[3] else None
        if max(least, most or 0) > MAX_REPEAT or (most is not None and most < least):
            self._fail(f"{match[0]} is wrong: expected numbers that rise to {MAX_REPEAT} at most")
        self._at = match.end()
        return Seq([]) if most == 0 else Repeat(item, least, most)

    def _char(self) -> int:
        """A character of a text or class, perhaps escaped."""
        place, char = self._at, self._peek()
        if char != "\\":
            self._at += 1
            return ord(char)
        match = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[nrt\\\"\[\]\-^])").match(
            self._text, place
        )
        code = match and (int(match[1][1:], 16) if match[1][0] in "xuU" else ord(_ESCAPES.get(match[1], match[1])))
        if not match or code is None or code > LAST:
            self._fail(r"expected one of \n \r \t \\ \" \[ \] \xHH \uHHHH \UHHHHHHHH")
        self._at = match.end()
        return code

    def _name(self) -> str:
        begin = self._at
        while _is_name(self._peek()):
            self._at += 1
        if begin == self._at:
            self._fail("expected a rule, name ::= ...")
        return self._text[begin : self._at]

    def _space(self, newlines: bool = False) -> None:
        """Pass over white space and comments."""
        match = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*" if newlines else r"(?:[ \t]|#[^\r\n]*)*").match(
            self._text, self._at
        )
        self._at = match.end() if match else self._at

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _expect(self, sign: str) -> None:
        if not self._text.startswith(sign, self._at):
            self._fail(f"expected {sign}")
        self._at += len(sign)

    def _where(self, place: int) -> str:
        return _where(self._text, place)

    def _fail(self, message: str, place: int | None = None) -> NoReturn:
        raise _wrong(self._text, self._at if place is None else place, message)


_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}


def _is_name(char: str) -> bool:
    return char.isascii() and (char.isalnum() or char in ("-", "_"))


def _where(text: str, place: int) -> str:
    return f"line {text.count(chr(10), 0, place) + 1}, column {place - text.rfind(chr(10), 0, place)}"


def _wrong(text: str, place: int, message: str) -> ArgumentError:
    found = text[place : place + 20].split("\n")[0]
    return ArgumentError(f"the grammar is wrong at {_where(text, place)} ({found!r}): {message}")


def _merged(ranges: Ranges) -> Ranges:
    merged: Ranges = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged


def _inverse(merged: Ranges) -> Ranges:
    edges = [0, *chain.from_iterable((first, last + 1) for first, last in merged), LAST + 1]
    return [(first, stop - 1) for first, stop in zip(edges[::2], edges[1::2], strict=True) if first < stop]


def _characters(ranges: Ranges) -> Ranges:
    """Sorted, and without surrogates, which no UTF-8 writes."""
    return _inverse(_merged([*_inverse(_merged(ranges)), (0xD800, 0xDFFF)]))


def parts(node: Node) -> list[Node]:
    if isinstance(node, (Seq, Alt)):
        return node.items
    return [node.item] if isinstance(node, Repeat) else []


def walk(node: Node) -> Iterator[Node]:
    """A node and all in it, the outer before the inner."""
    yield node
    for part in parts(node):
        yield from walk(part)


def _check(text: str, rules: dict[str, tuple[Node, int]]) -> None:
    if "root" not in rules:
        raise ArgumentError(f"the grammar has no rule root; expected one beside {', '.join(rules) or 'nothing'}")
    for ref in chain.from_iterable(refs(body) for body, _ in rules.values()):
        if ref.name not in rules:
            raise _wrong(text, ref.place - len(ref.name), f"there is no rule {ref.name!r}")
    sides = {name: body for name, (body, _) in rules.items()}
    lengths = fixed_point(sides, math.inf, shortest)
    if endless := next((name for name, length in lengths.items() if length == math.inf), None):
        raise _wrong(text, rules[endless][1], f"the rule {endless!r} never ends; expected a way out of it")
    for name, side in sides.items():
        if any(shortest(node, lengths) > MAX_LENGTH for node in walk(side)):
            raise UnsupportedError(f"the rule {name!r} demands more than {MAX_LENGTH} characters; expected less")
    leads = {name: set(_first_refs(side, lengths)) for name, side in sides.items()}
    left = rules.keys() - set(acyclic(leads))
    if left:
        name = _on_cycle({name: leads[name] & left for name in left})
        message = f"the rule {name!r} begins with itself (left recursion); expected another part first"
        raise _wrong(text, rules[name][1], message)


def refs(node: Node) -> Iterator[Ref]:
    return (inner for inner in walk(node) if isinstance(inner, Ref))


def _users(sides: dict[str, Node]) -> dict[str, list[str]]:
    """For each rule, those that refer to it."""
    users: dict[str, list[str]] = {name: [] for name in sides}
    for name, side in sides.items():
        for ref in refs(side):
            users[ref.name].append(name)
    return users


def fixed_point(sides: dict[str, Node], bottom: T, value: Callable[[Node, dict[str, T]], T]) -> dict[str, T]:
    """What a function of a rule's right side, and of the values of the rules in it, comes to from a first value on."""
    values, users, todo = dict.fromkeys(sides, bottom), _users(sides), list(sides)
    while todo:
        name = todo.pop()
        new = value(sides[name], values)
        if new != values[name]:
            values[name] = new
            todo += users[name]
    return values


def shortest(node: Node, lengths: dict[str, float]) -> float:
    """The length of a node's shortest text, infinite if none ends, by those of the rules."""
    if isinstance(node, Ref):
        return lengths[node.name]
    if isinstance(node, Repeat):
        return node.least * shortest(node.item, lengths) if node.least else 0
    if isinstance(node, Alt):
        return min(shortest(item, lengths) for item in node.items)
    return 1 if isinstance(node, Chars) else sum(shortest(item, lengths) for item in node.items)


def _first_refs(node: Node, lengths: dict[str, float]) -> Iterator[str]:
    """Rules that a text of the node may begin with."""
    if isinstance(node, Ref):
        yield node.name
    for part in parts(node):
        yield from _first_refs(part, lengths)
        if isinstance(node, Seq) and shortest(part, lengths) > 0:
            return


def acyclic(leads: dict[str, set[str]]) -> list[str]:
    """The names that lead to no cycle, each after those it leads to."""
    users: dict[str, list[str]] = {name: [] for name in leads}
    for name, others in leads.items():
        for other in others:
            users[other].append(name)
    open = {name: len(others) for name, others in leads.items()}
    order = [name for name, n in open.items() if not n]
    for name in order:
        for user in users[name]:
            open[user] -= 1
            if not open[user]:
                order.append(user)
    return order


def _on_cycle(leads: dict[str, set[str]]) -> str:
    """A name that leads to itself, of names that all lead to others of them."""
    name, seen = min(leads), set[str]()
    while name not in seen:
        seen.add(name)
        name = min(leads[name])
    return name
