"""JSON schemas (draft 2020-12) checked and prepared for a grammar: what is not supported is refused by name.

Knows schemas, not tokens. What is left is narrower than the schema allows, never wider: one way to write each value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from edgellm.errors import ArgumentError, UnsupportedError
from edgellm.sampling import check_texts

JsonSchema = str | bool | Mapping[str, Any]
"""A schema, or its text."""

SINGLE = ("items", "additionalProperties")
LISTS = ("prefixItems", "allOf", "anyOf", "oneOf")
MAPS = ("properties", "patternProperties", "$defs", "definitions")
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
LIMITS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
OTHERS = ("type", "const", "enum", "pattern", "format", "required", "$ref", "$id", "$anchor", "$schema")
ANNOTATIONS = (
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment"),
    *("contentEncoding", "contentMediaType", "contentSchema"),
)
KEYWORDS = (*SINGLE, *LISTS, *MAPS, *COUNTS, *LIMITS, *OTHERS)
"""Keywords that are kept to."""

DRAFTS = ("draft/2020-12", "draft/2019-09", "draft-07")
MAX_PROPERTIES = 4000
"""Of a whole schema. The time to compile it grows with their square: some 2 seconds for as many."""
MAX_DEPTH = 60
MAX_LENGTH = 100_000
"""Of the shortest instance of each part."""
MAX_LEVELS = 1000
"""Of the schema and all that its references mean, one in another. Each takes some of the stack of a thread."""

_DAYS = r"(0[1-9]|1\d|2[0-8])"
_LEAP = r"([0-9]{2}(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)-02-29"
_DATE = rf"([0-9]{{4}}-(02-{_DAYS}|(0[13-9]|1[0-2])-[0-9]{{2}})|{_LEAP})"
_TIME = r"[0-9]{2}:[0-9]{2}:[0-5][0-9](\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})$"
_LABEL = r"[A-Za-z0-9]+(-[A-Za-z0-9]+)*"
FORMATS: Mapping[str, dict[str, Any]] = {
    **{name: {} for name in ("duration", "email", "ipv4", "ipv6", "uri", "uuid")},
    # What the library lets through besides: the 29th of February of any year, seconds numbered 60, names too long;
    # and fractions of seconds without end.
    "date": {"pattern": f"^{_DATE}$"},
    "time": {"pattern": f"^{_TIME}"},
    "date-time": {"pattern": f"^{_DATE}[Tt]{_TIME}"},
    "hostname": {"pattern": rf"^{_LABEL}(\.{_LABEL})*$", "maxLength": 253},
}
"""Formats that are kept to, and what is demanded beside them."""


def parse(text: str) -> Any:
    """JSON text -> a schema; raises ArgumentError if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"the JSON schema is not JSON: {error}; expected an object") from error


def prepared(schema: Any) -> Any:
    """The schema as the grammar's library shall have it. Raises UnsupportedError for a keyword, format or size that
    cannot be kept to, ArgumentError for what is no schema or has only endless instances."""
    result = _prepared({"allOf": [schema]} if isinstance(schema, bool) else schema, "#", 0)
    if sum(len(node.get("properties", ())) for node in _nodes(result)) > MAX_PROPERTIES:
        raise UnsupportedError(f"the JSON schema has more than {MAX_PROPERTIES} properties; expected at most as many")
    if _levels(result) > MAX_LEVELS:
        raise UnsupportedError(f"the JSON schema has too many references: one in another, {MAX_LEVELS} levels or more")
    lengths = _lengths(result)
    if lengths[-1] == math.inf:
        raise ArgumentError("the JSON schema has only endless instances; expected a $ref that may be left out")
    if any(MAX_LENGTH < length < math.inf for length in lengths):
        raise UnsupportedError(f"the JSON schema demands instances of more than {MAX_LENGTH} characters; ask for less")
    return result


def _prepared(schema: Any, at: str, depth: int) -> Any:
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, Mapping):
        raise ArgumentError(f"the JSON schema has {_short(schema)} at {at}; expected an object, true or false")
    if depth > MAX_DEPTH:
        raise UnsupportedError(f"the JSON schema is deeper than {MAX_DEPTH} levels at {at}; use $defs and $ref")
    _check(schema, at)
    return _with_format({key: _part(key, value, f"{at}/{key}", depth) for key, value in schema.items()})


def _part(key: str, value: Any, at: str, depth: int) -> Any:
    if key in MAPS:
        if not isinstance(value, Mapping):
            raise ArgumentError(f"the JSON schema has {_short(value)} at {at}; expected an object")
        _check_strings(list(value), at)
        return {name: _prepared(item, f"{at}/{name}", depth + 1) for name, item in value.items()}
    if key in LISTS or (key == "items" and isinstance(value, list)):
        if not isinstance(value, list):
            raise ArgumentError(f"the JSON schema has {_short(value)} at {at}; expected a list")
        return [_prepared(item, f"{at}/{n}", depth + 1) for n, item in enumerate(value)]
    if key in SINGLE:
        return _prepared(value, at, depth + 1)
    if key in COUNTS and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _check(schema: Mapping[str, Any], at: str) -> None:
    for key in schema:
        if key not in KEYWORDS and key not in ANNOTATIONS and (not key.startswith("x-") or key == "x-guidance"):
            raise UnsupportedError(
                f"the JSON schema has the keyword {key!r} at {at}, which is not supported; leave it out: "
                f"supported are {', '.join(KEYWORDS)}"
            )
    _check_strings([schema.get("const"), schema.get("enum"), schema.get("required")], at)
    _check_numbers([schema.get(key) for key in ("const", "enum", *LIMITS)], at)
    if isinstance(pattern := schema.get("pattern"), str):
        check_texts(f"the JSON schema's pattern at {at}", [pattern])
    format, draft = schema.get("format"), schema.get("$schema")
    if format is not None and format not in FORMATS:
        raise UnsupportedError(
            f"the JSON schema has the format {_short(format)} at {at}, which is not supported; leave it out, or give "
            f"a pattern: supported are {', '.join(FORMATS)}"
        )
    if draft is not None and not (isinstance(draft, str) and any(name in draft for name in DRAFTS)):
        raise UnsupportedError(f"the JSON schema is of {_short(draft)}; supported are {', '.join(DRAFTS)}")
    least, required = schema.get("minProperties", 0), schema.get("required", [])
    if isinstance(least, (int, float)) and isinstance(required, list) and least > len(required) + 1:
        # Nothing keeps a grammar from giving a name twice.
        raise UnsupportedError(
            f"the JSON schema has a minProperties of {least} at {at}, which is not supported beyond the number of "
            "required properties and one; list more of them as required"
        )


def _check_strings(value: Any, at: str) -> None:
    """Raise UnsupportedError for a character that only a numeric escape writes: a name could be written two ways."""
    if isinstance(value, str):
        if odd := next((char for char in value if _needs_number(char)), None):
            raise UnsupportedError(
                f"the JSON schema has the character U+{ord(odd):04X} in {_short(value)} at {at}, which is not "
                "supported; leave it out"
            )
    elif isinstance(value, Mapping):
        _check_strings([list(value), list(value.values())], at)
    elif isinstance(value, list):
        for item in value:
            _check_strings(item, at)


def _check_numbers(value: Any, at: str) -> None:
    """Raise UnsupportedError for a whole number that the grammar's library would round."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UnsupportedError(
            f"the JSON schema has the number {value} at {at}, beyond 64 bits, which is not supported; leave it out"
        )
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        _check_numbers(item, at)


def _needs_number(char: str) -> bool:
    return (char < " " and char not in "\b\f\n\r\t") or char == "\x7f" or "\ud800" <= char <= "\udfff"


def _with_format(schema: dict[str, Any]) -> dict[str, Any]:
    more = FORMATS.get(schema.get("format", ""))
    if more and isinstance(schema.get("allOf", []), list):
        return {**schema, "allOf": [*schema.get("allOf", []), more]}
    return schema


def _inner(schema: Any) -> Iterator[Any]:
    """The schemas directly in a prepared one."""
    for key in schema.keys() & {*MAPS, *LISTS, *SINGLE} if isinstance(schema, dict) else ():
        value = schema[key]
        yield from value.values() if key in MAPS else value if isinstance(value, list) else [value]


def _nodes(schema: Any) -> Iterator[dict[str, Any]]:
    """A prepared schema and all schemas in it, the outer before the inner, less those that are true or false."""
    if isinstance(schema, dict):
        yield schema
        for item in _inner(schema):
            yield from _nodes(item)


def _levels(root: Any) -> int:
    """The most levels that can be one in another, each reference being followed once."""
    refs = {str(node["$ref"]): node["$ref"] for node in _nodes(root) if "$ref" in node}
    targets = {id(target): target for target in map(_resolver(root), refs.values())}
    return sum(map(_height, [root, *targets.values()]))


def _height(schema: Any) -> int:
    return 1 + max(map(_height, _inner(schema)), default=0)


def _resolver(root: Any) -> Callable[[Any], Any]:
    """What a reference within the schema means; True, as nothing is known of it, for others."""
    anchors = {f"#{node['$anchor']}": node for node in _nodes(root) if "$anchor" in node}

    def resolve(ref: Any) -> Any:
        if not isinstance(ref, str) or not (ref in anchors or ref == "#" or ref.startswith("#/")):
            return True
        found = anchors.get(ref, root)
        for step in ref.split("/")[1:]:
            found = _entry(found, unquote(step).replace("~1", "/").replace("~0", "~"))
        return found

    return resolve


def _entry(value: Any, key: str) -> Any:
    if isinstance(value, list):
        return value[int(key)] if key.isdecimal() and int(key) < len(value) else True
    return value.get(key, True) if isinstance(value, dict) else True


def _lengths(root: Any) -> list[float]:
    """Characters of the shortest instance of each schema; infinite for those without one. At first none is known to
    have one."""
    nodes, target = list(_nodes(root))[::-1], _resolver(root)
    known: dict[int, float] = {id(node): math.inf for node in nodes}

    def length(schema: Any) -> float:
        return known.get(id(schema), 1)

    changed = True
    while changed:
        changed = False
        for node in nodes:
            new = _length(node, length, target)
            changed |= new != known[id(node)]
            known[id(node)] = new
    return list(known.values())


def _length(node: dict[str, Any], length: Callable[[Any], float], target: Callable[[Any], Any]) -> float:
    if "const" in node:
        return len(json.dumps(node["const"]))
    if "enum" in node:
        return 1
    types = node.get("type", "null")
    own = min((_type_length(node, type, length) for type in (types if isinstance(types, list) else [types])), default=1)
    others = [*map(length, node.get("allOf", ()))]
    others += [min(map(length, node[key]), default=1) for key in ("anyOf", "oneOf") if key in node]
    return max(own, *others, length(target(node["$ref"])) if "$ref" in node else 1)


def _type_length(node: dict[str, Any], type: str, length: Callable[[Any], float]) -> float:
    if type == "object":
        named, others = node.get("properties", {}), node.get("additionalProperties", True)
        return 2 + sum(length(named.get(name, others)) for name in _known(node, "required", list, []))
    if type == "array":
        first, rest, least = node.get("prefixItems", []), node.get("items", True), _known(node, "minItems", int, 0)
        first, rest = (rest, True) if isinstance(rest, list) else (first, rest)
        more = max(least - len(first), 0)  # times, but 0 times infinity is 0
        return 2 + sum(map(length, first[:least])) + (more * length(rest) if more else 0)
    return _known(node, "minLength", int, 1) if type == "string" else 1


def _known(node: dict[str, Any], key: str, kind: type, default: Any) -> Any:
    """A keyword's value if it is of its kind; if not, the grammar's library refuses it."""
    value = node.get(key, default)
    return value if isinstance(value, kind) else default


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
