"""GBNF rules -> Lark as llguidance reads it, with the same texts in it.

llguidance cuts a text into lexemes, each as long as can be, and then parses; GBNF knows no lexemes. So a part of a
grammar without recursion is one lexeme only where no text is lost by that. Where a longer lexeme could swallow what
should follow a shorter one, it is split, at last into single characters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby, product

from edgellm.errors import UnsupportedError
from edgellm.structured.gbnf import (
    Alt,
    Chars,
    Node,
    Ref,
    Repeat,
    Seq,
    acyclic,
    fixed_point,
    parse,
    parts,
    refs,
    shortest,
    walk,
)

MAX_SIZE = 50_000
"""Characters of one lexeme."""
MAX_NESTED = 50
"""Rules in one another within a lexeme."""
MAX_RULES = 500
"""Rules outside of lexemes. llguidance goes through them in one another, and the stack of a thread has an end."""
MAX_STEPS = 1_000_000
"""Of looking whether lexemes are in each other's way."""


@dataclass(eq=False)
class Lexeme:
    """A part without recursion: matched as a whole, or split into finer ones."""

    node: Node
    split: Form | None = None


@dataclass(eq=False)
class Group:
    """A sequence, alternatives or a repetition of forms; `node` is what of GBNF it stands for."""

    node: Seq | Alt | Repeat
    forms: list[Form]


Form = Lexeme | Group | Ref


def to_lark(text: str) -> str:
    """GBNF -> Lark. Raises what gbnf.parse raises, and UnsupportedError for a grammar that is too large."""
    return _Translation(parse(text)).lark()


class _Translation:
    def __init__(self, sides: dict[str, Node]) -> None:
        self._sides = sides
        self._lengths = fixed_point(sides, math.inf, shortest)
        self._sizes = _small_rules(sides)
        self._steps = _Steps()
        self._alphabet = _Alphabet(node for side in sides.values() for node in walk(side) if isinstance(node, Chars))
        self._firsts = fixed_point(sides, 0, self._first)
        self._forms: dict[str, Form] = {}
        self._make_forms("root")
        while lexemes := self._in_the_way():
            for lexeme in lexemes:
                self._split(lexeme)

    def lark(self) -> str:
        rules = {name: f"r{n}" for n, name in enumerate(self._forms)}
        terminals: dict[str, str] = {}
        lines = [f"{rules[name]}: {self._written(form, rules, terminals)}" for name, form in self._forms.items()]
        lines += [f"{name}: {regex}" for regex, name in terminals.items()]
        return "\n".join([f"start: {rules['root']}", *lines])

    # Forms: rules over lexemes.

    def _make_forms(self, name: str) -> None:
        """Have a rule among the forms, and those it refers to outside of lexemes."""
        todo = [name]
        while todo:
            name = todo.pop()
            if name not in self._forms:
                if len(self._forms) == MAX_RULES:
                    raise UnsupportedError(f"the grammar has more than {MAX_RULES} rules; expected at most as many")
                self._forms[name] = form = self._form(self._sides[name])
                todo += [inner.name for inner in _walk_form(form) if isinstance(inner, Ref)]

    def _form(self, node: Node) -> Form:
        """The largest parts without recursion become lexemes."""
        if self._is_regular(node):
            return Lexeme(node)
        if isinstance(node, Seq):
            return Group(node, [self._form(item) for item in self._runs(node.items)])
        return node if isinstance(node, Ref) else Group(node, [self._form(part) for part in parts(node)])  # type: ignore[arg-type]

    def _runs(self, items: list[Node]) -> Iterator[Node]:
        """The items of a sequence, neighbours without recursion put together."""
        for regular, run in groupby(items, self._is_regular):
            if regular:
                yield Seq(list(run))
            else:
                yield from run

    def _is_regular(self, node: Node) -> bool:
        return all(ref.name in self._sizes for ref in refs(node))

    def _split(self, lexeme: Lexeme) -> None:
        node = lexeme.node
        if isinstance(node, Ref):
            self._make_forms(node.name)
            lexeme.split = node
        elif not isinstance(node, Chars):
            lexeme.split = Group(node, [Lexeme(part) for part in parts(node)])

    # What is in the way of what: sets of characters are the bits of integers.

    def _in_the_way(self) -> list[Lexeme]:
        """Lexemes that go on, where another one could end, with a character that may follow that one."""
        same: dict[str, list[Lexeme]] = {}
        follows: dict[str, int] = {}
        for lexeme, after in self._follows().items():
            regex = _regex(lexeme.node, self._sides)
            same.setdefault(regex, []).append(lexeme)
            follows[regex] = follows.get(regex, 0) | after
        automata = {regex: _Automaton(same[regex][0].node, self._sides, self._alphabet) for regex in same}
        return [
            lexeme
            for regex, automaton in automata.items()
            if any(automaton.swallows(automata[other], after, self._steps) for other, after in follows.items())
            for lexeme in same[regex]
        ]

    def _follows(self) -> dict[Lexeme, int]:
        """The characters that may come after each lexeme."""
        follows: dict[Lexeme, int] = {}
        rules = dict.fromkeys(self._forms, 0)
        todo = list(rules)
        while todo:
            name = todo.pop()
            for form, after in self._after(self._forms[name], rules[name]):
                if isinstance(form, Lexeme):
                    follows[form] = follows.get(form, 0) | after
                elif after & ~rules[form.name]:
                    rules[form.name] |= after
                    todo.append(form.name)
        return follows

    def _after(self, form: Form, after: int) -> Iterator[tuple[Lexeme | Ref, int]]:
        """The lexemes and rules of a form, with what may come after each if `after` may come after it all."""
        if isinstance(form, Lexeme) and form.split:
            yield from self._after(form.split, after)
        elif not isinstance(form, Group):
            yield form, after
        elif isinstance(form.node, Seq):
            for part in reversed(form.forms):
                yield from self._after(part, after)
                after = self._first(_node(part), self._firsts) | (0 if shortest(_node(part), self._lengths) else after)
        else:
            again = self._first(form.node, self._firsts) if isinstance(form.node, Repeat) and form.node.most != 1 else 0
            for part in form.forms:
                yield from self._after(part, after | again)

    def _first(self, node: Node, firsts: dict[str, int]) -> int:
        """The characters that a text of the node may begin with, by those of the rules."""
        if isinstance(node, Chars):
            return self._alphabet.bits(node)
        if isinstance(node, Ref):
            return firsts[node.name]
        first = 0
        for part in parts(node):
            first |= self._first(part, firsts)
            if isinstance(node, Seq) and shortest(part, self._lengths):
                break
        return first

    # Lark.

    def _written(self, form: Form, rules: dict[str, str], terminals: dict[str, str]) -> str:
        if isinstance(form, Ref):
            return rules[form.name]
        if isinstance(form, Lexeme):
            return self._written(form.split, rules, terminals) if form.split else self._terminal(form.node, terminals)
        texts = [self._written(part, rules, terminals) for part in form.forms]
        if isinstance(form.node, Repeat):
            return f"({texts[0]}){_count(form.node)}"
        return f"({(' ' if isinstance(form.node, Seq) else ' | ').join(texts)})"

    def _terminal(self, node: Node, terminals: dict[str, str]) -> str:
        """A lexeme's name; a lexeme is never empty, so one that may be is optional."""
        regex = _regex(node, self._sides)
        if not regex:
            return '""'
        if shortest(node, self._lengths):
            return terminals.setdefault(f"/{regex}/", f"T{len(terminals)}")
        return terminals.setdefault(f"/{regex}/ & /[\\x{{0}}-\\x{{10FFFF}}]+/", f"T{len(terminals)}") + "?"


class _Alphabet:
    """The characters of a grammar, those put together that it never tells apart."""

    def __init__(self, chars: Iterable[Chars]) -> None:
        self._chars = list(chars)
        edges = sorted({edge for char in self._chars for first, last in char.ranges for edge in (first, last + 1)})
        place = {edge: n for n, edge in enumerate(edges)}
        self._bits = {
            char: sum((1 << place[last + 1]) - (1 << place[first]) for first, last in char.ranges)
            for char in self._chars
        }

    def bits(self, chars: Chars) -> int:
        return self._bits[chars]


class _Steps:
    """A count of steps that raises UnsupportedError when there are too many."""

    def __init__(self) -> None:
        self._n = 0

    def count(self) -> None:
        self._n += 1
        if self._n > MAX_STEPS:
            raise UnsupportedError("the grammar is too large; expected fewer rules, or smaller ones")


class _Automaton:
    """Glushkov's of a node without recursion: a state is one of its characters, the last that was read.

    A number of repetitions counts as any number: then some lexemes are split that need not be.
    """

    def __init__(self, node: Node, sides: dict[str, Node], alphabet: _Alphabet) -> None:
        self._sides, self._alphabet = sides, alphabet
        self._bits: list[int] = []
        self._next: list[list[set[int]]] = []
        self._first, self._last, _ = self._build(node)

    def _build(self, node: Node) -> tuple[set[int], set[int], bool]:
        """First states, last states, and whether the node may be empty."""
        if isinstance(node, Chars):
            self._bits.append(self._alphabet.bits(node))
            self._next.append([])
            return {len(self._bits) - 1}, {len(self._bits) - 1}, False
        if isinstance(node, Ref):
            return self._build(self._sides[node.name])
        if isinstance(node, Repeat):
            first, last, empty = self._build(node.item)
            self._connect(last, first)
            return first, last, empty or node.least == 0
        if isinstance(node, Alt):
            firsts, lasts, empties = zip(*map(self._build, node.items), strict=True)
            return set().union(*firsts), set().union(*lasts), any(empties)
        first, last, empty = set[int](), set[int](), True
        for item in node.items:
            its_first, its_last, its_empty = self._build(item)
            self._connect(last, its_first)
            first = first | its_first if empty else first
            last = its_last | (last if its_empty else set())
            empty = empty and its_empty
        return first, last, empty

    def _connect(self, lasts: set[int], firsts: set[int]) -> None:
        for last in lasts:
            self._next[last].append(firsts)

    def swallows(self, other: _Automaton, follow: int, steps: _Steps) -> bool:
        """Whether, after a text that is all of the other, this one goes on with a character of `follow`."""
        todo = [([self._first], [other._first])] if follow else []
        seen = set[tuple[int, int]]()
        while todo:
            mine, its = todo.pop()
            for pair in product(chain.from_iterable(mine), chain.from_iterable(its)):
                steps.count()
                if pair in seen or not self._bits[pair[0]] & other._bits[pair[1]]:
                    continue
                seen.add(pair)
                after = self._next[pair[0]]
                if pair[1] in other._last and any(self._bits[state] & follow for state in chain.from_iterable(after)):
                    return True
                todo.append((after, other._next[pair[1]]))
        return False


def _small_rules(sides: dict[str, Node]) -> dict[str, int]:
    """The rules without recursion that may be parts of lexemes, and how many characters they have."""
    sizes: dict[str, int] = {}
    nested: dict[str, int] = {}
    for name in acyclic({name: {ref.name for ref in refs(side)} for name, side in sides.items()}):
        used = {ref.name for ref in refs(sides[name])}
        if used <= sizes.keys():
            nested[name] = 1 + max((nested[other] for other in used), default=0)
            size = _size(sides[name], sizes)
            if nested[name] <= MAX_NESTED and size <= MAX_SIZE:
                sizes[name] = size
    return sizes


def _size(node: Node, sizes: dict[str, int]) -> int:
    return sum(sizes[inner.name] if isinstance(inner, Ref) else isinstance(inner, Chars) for inner in walk(node))


def _node(form: Form) -> Node:
    return form if isinstance(form, Ref) else form.node


def _walk_form(form: Form) -> Iterator[Form]:
    yield form
    for part in form.forms if isinstance(form, Group) else []:
        yield from _walk_form(part)


def _regex(node: Node, sides: dict[str, Node]) -> str:
    if isinstance(node, Chars):
        ranges = [rf"\x{{{first:X}}}" + rf"-\x{{{last:X}}}" * (first < last) for first, last in node.ranges]
        return ranges[0] if len(ranges) == 1 and "-" not in ranges[0] else f"[{''.join(ranges)}]"
    if isinstance(node, Ref):
        return _regex(sides[node.name], sides)
    texts = [_regex(part, sides) for part in parts(node)]
    if isinstance(node, Seq):
        return "".join(texts)
    return f"(?:{texts[0]}){_count(node)}" if isinstance(node, Repeat) else f"(?:{'|'.join(texts)})"


def _count(repeat: Repeat) -> str:
    signs = {(0, None): "*", (1, None): "+", (0, 1): "?"}
    most = "" if repeat.most is None else repeat.most
    return signs.get((repeat.least, repeat.most), f"{{{repeat.least},{most}}}")
