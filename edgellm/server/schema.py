"""Kinds of JSON values, and requests made of them: what is unknown or wrong is refused by its name.

`read` gives the value or raises RequestError; `schema` is the same as a JSON schema, for /openapi.json.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from edgellm.server.errors import RequestError

MOST_CHARACTERS = 1_000_000
"""Of a text that is encoded however long it is: while the library cuts it into words, nothing else goes on."""


class Kind(Protocol):
    @property
    def what(self) -> str:
        """In an error: expected ..."""

    def fits(self, value: Any) -> bool:
        """Whether the value is of the right JSON type."""

    def read(self, value: Any, at: str) -> Any:
        """`at` is the path of the value, like messages[0].role."""

    def schema(self) -> dict[str, Any]: ...


def _refused(value: Any, at: str, kind: Kind) -> RequestError:
    shown = json.dumps(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    return RequestError(f"{at} is {shown}; expected {kind.what}", param=at)


@dataclass(frozen=True)
class Anything:
    what = "a JSON value"

    def fits(self, value: Any) -> bool:
        return True

    def read(self, value: Any, at: str) -> Any:
        return value

    def schema(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Flag:
    what = "true or false"

    def fits(self, value: Any) -> bool:
        return isinstance(value, bool)

    def read(self, value: Any, at: str) -> bool:
        if not isinstance(value, bool):
            raise _refused(value, at, self)
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean"}


@dataclass(frozen=True)
class Number:
    low: float = -math.inf
    high: float = math.inf
    noun: ClassVar[str] = "a number"
    name: ClassVar[str] = "number"
    types: ClassVar[tuple[type[int] | type[float], ...]] = (int, float)

    @property
    def what(self) -> str:
        return f"{self.noun}{_bounds(self.low, self.high)}"

    def fits(self, value: Any) -> bool:
        return isinstance(value, self.types) and not isinstance(value, bool)

    def read(self, value: Any, at: str) -> Any:
        if not self.fits(value) or not self.low <= value <= self.high:
            raise _refused(value, at, self)
        return self.types[-1](value)

    def schema(self) -> dict[str, Any]:
        return {"type": self.name, **_limits(self.low, self.high)}


class Whole(Number):
    noun, name, types = "a whole number", "integer", (int,)


@dataclass(frozen=True)
class Text:
    choices: Sequence[str] = ()
    """The only ones there may be; none allows any text."""
    most: int | None = None
    """Characters."""

    @property
    def what(self) -> str:
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        return "a text" if self.most is None else f"a text of at most {self.most} characters"

    def fits(self, value: Any) -> bool:
        return isinstance(value, str)

    def read(self, value: Any, at: str) -> str:
        if not isinstance(value, str) or (self.choices and value not in self.choices):
            raise _refused(value, at, self)
        if self.most is not None and len(value) > self.most:
            raise _refused(value, at, self)
        return value

    def schema(self) -> dict[str, Any]:
        most = {} if self.most is None else {"maxLength": self.most}
        return {"type": "string", **({"enum": list(self.choices)} if self.choices else {}), **most}


UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
DURATION = r"-?(\d+(\.\d+)?(ms|s|m|h))+|-?\d+(\.\d+)?"


def seconds_of(value: str | float) -> float:
    """A number of seconds, or a text such as 5m or 1h30m -> seconds, infinity for one below 0; raises ValueError."""
    if isinstance(value, str):
        if len(value) > 30 or not re.fullmatch(DURATION, value):
            raise ValueError(f"{value!r} is no time")
        parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h)?", value)
        value = (-1 if value[0] == "-" else 1) * sum(float(number) * UNITS[unit or "s"] for number, unit in parts)
    return math.inf if value < 0 else float(value)


@dataclass(frozen=True)
class Duration:
    """Seconds, as a number or as Ollama has them: 300, "5m", "-1" for ever."""

    what = 'seconds, or a text such as "5m", below 0 for ever'

    def fits(self, value: Any) -> bool:
        return isinstance(value, (int, float, str)) and not isinstance(value, bool)

    def read(self, value: Any, at: str) -> float:
        if not self.fits(value):
            raise _refused(value, at, self)
        try:
            return seconds_of(value)
        except (ValueError, OverflowError):
            raise _refused(value, at, self) from None

    def schema(self) -> dict[str, Any]:
        return {"anyOf": [{"type": "number"}, {"type": "string", "maxLength": 30, "pattern": f"^({DURATION})$"}]}


@dataclass(frozen=True)
class ListOf:
    item: Kind
    least: int = 0
    most: int | None = None

    @property
    def what(self) -> str:
        if self.most is not None:
            number = f"{self.least} to {self.most}" if self.least else f"at most {self.most}"
            return f"a list, {number} of each {self.item.what}"
        return f"a list that is not empty, {self.item.what}" if self.least else f"a list, each {self.item.what}"

    def fits(self, value: Any) -> bool:
        return isinstance(value, list)

    def read(self, value: Any, at: str) -> list[Any]:
        if not isinstance(value, list) or len(value) < self.least or (self.most is not None and len(value) > self.most):
            raise _refused(value, at, self)
        return [self.item.read(item, f"{at}[{i}]") for i, item in enumerate(value)]

    def schema(self) -> dict[str, Any]:
        most = {} if self.most is None else {"maxItems": self.most}
        return {"type": "array", "items": self.item.schema(), "minItems": self.least, **most}


@dataclass(frozen=True)
class MapOf:
    """An object whose names a client chooses."""

    item: Kind

    @property
    def what(self) -> str:
        return f"an object of which each value is {self.item.what}"

    def fits(self, value: Any) -> bool:
        return isinstance(value, dict)

    def read(self, value: Any, at: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _refused(value, at, self)
        return {name: self.item.read(item, f"{at}.{name}") for name, item in value.items()}

    def schema(self) -> dict[str, Any]:
        return {"type": "object", "additionalProperties": self.item.schema()}


@dataclass(frozen=True)
class Either:
    """A value of one of some kinds, told apart by their JSON types."""

    kinds: tuple[Kind, ...]

    @property
    def what(self) -> str:
        return ", or ".join(kind.what for kind in self.kinds)

    def fits(self, value: Any) -> bool:
        return any(kind.fits(value) for kind in self.kinds)

    def read(self, value: Any, at: str) -> Any:
        fitting = [kind for kind in self.kinds if kind.fits(value)]
        if not fitting:
            raise _refused(value, at, self)
        return fitting[0].read(value, at)

    def schema(self) -> dict[str, Any]:
        return {"anyOf": [kind.schema() for kind in self.kinds]}


@dataclass(frozen=True)
class Object:
    """An object of known fields.

    A field that is null counts as absent, known or not; what is absent is not in what is read.
    """

    fields: Mapping[str, Kind]
    required: Sequence[str] = ()
    what: str = field(default="an object")

    def fits(self, value: Any) -> bool:
        return isinstance(value, dict)

    def read(self, value: Any, at: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _refused(value, at or "the request", self)
        given = {name: item for name, item in value.items() if item is not None}
        before = f"{at}." if at else ""
        for name in given:
            if name not in self.fields:
                raise RequestError(
                    f"{before}{name} is not known here; expected of: {', '.join(self.fields)}", param=f"{before}{name}"
                )
        for name in self.required:
            if name not in given:
                raise RequestError(
                    f"{before}{name} is missing; expected {self.fields[name].what}", param=f"{before}{name}"
                )
        return {name: self.fields[name].read(item, f"{before}{name}") for name, item in given.items()}

    def schema(self) -> dict[str, Any]:
        known = {
            name: kind.schema() if name in self.required else {"anyOf": [kind.schema(), {"type": "null"}]}
            for name, kind in self.fields.items()
        }
        others = {"type": "null"}
        return {
            "type": "object", "properties": known, "required": list(self.required), "additionalProperties": others
        }  # fmt: skip


@dataclass(frozen=True)
class Tagged:
    """An object of one of some kinds, told apart by its `type`, which their own fields are without."""

    kinds: Mapping[str, Object]
    default: str | None = None
    """The kind of one that has no type; None: it must have one."""

    @property
    def what(self) -> str:
        return f"an object with a type of {', '.join(self.kinds)}"

    def fits(self, value: Any) -> bool:
        return isinstance(value, dict)

    def read(self, value: Any, at: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _refused(value, at, self)
        given = value.get("type")
        type_ = Text(tuple(self.kinds)).read(self.default if given is None else given, f"{at}.type")
        others = {name: item for name, item in value.items() if name != "type"}
        return {"type": type_, **self.kinds[type_].read(others, at)}

    def schema(self) -> dict[str, Any]:
        return {"anyOf": [self._schema(type_, kind.schema()) for type_, kind in self.kinds.items()]}

    def _schema(self, type_: str, others: dict[str, Any]) -> dict[str, Any]:
        types = [type_, None] if type_ == self.default else [type_]
        required = [] if type_ == self.default else ["type"]
        return {
            **others,
            "properties": {"type": {"enum": types}, **others["properties"]},
            "required": [*required, *others["required"]],
        }


def _bounds(low: float, high: float) -> str:
    bounds = [f"{word} {bound:g}" for word, bound in (("at least", low), ("at most", high)) if math.isfinite(bound)]
    return f" of {' and '.join(bounds)}" if bounds else ""


def _limits(low: float, high: float) -> dict[str, float]:
    return {name: bound for name, bound in (("minimum", low), ("maximum", high)) if math.isfinite(bound)}
