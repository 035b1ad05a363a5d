"""A conversation in a file: its messages and settings, for the model that it was held with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgellm.errors import ArgumentError
from edgellm.shared import replacing

FORMAT = 1
LARGEST = 64_000_000
"""Bytes of a session file: a book of text has a few million."""
ROLES = ("system", "user", "assistant", "tool")


@dataclass
class Session:
    model: str
    """The model's name, for people."""
    fingerprint: str
    """Of the model's file: another model's words would be continued as if they were its own."""
    messages: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """All or nothing; raises ArgumentError where it cannot be written."""
        content = json.dumps({"edgellm_session": FORMAT, **vars(self)}, ensure_ascii=False, indent=1)
        with replacing(path) as file:
            file.write(content.encode())


def cache_path(path: Path) -> Path:
    """Where what a model remembers of the conversation in a file is."""
    return path.with_name(path.name + ".cache")


def read(path: Path, fingerprint: str) -> Session:
    """The session in a file; raises ArgumentError if it is damaged, or of a model with another fingerprint."""
    content = _object(path)
    if content.get("edgellm_session") != FORMAT:
        found = content.get("edgellm_session", "none")
        raise ArgumentError(f"{path} has the session format {str(found)[:20]}; expected {FORMAT}: is it a saved chat?")
    try:
        session = Session(*(content[key] for key in ("model", "fingerprint", "messages", "settings")))
    except KeyError as error:
        raise ArgumentError(f"{path} has no {error.args[0]!r}; expected a whole session: it is damaged") from None
    _check_messages(path, session.messages)
    if not isinstance(session.settings, Mapping) or not isinstance(session.model, str):
        raise ArgumentError(f"{path} has settings or a model that are no settings or name; it is damaged")
    if session.fingerprint != fingerprint:
        raise ArgumentError(
            f"{path} is a chat with the model {session.model!r}, whose file is not the one that is loaded; expected "
            "the same: start with that model (-m)"
        )
    return session


def _object(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST:
            raise ArgumentError(f"{path} has {path.stat().st_size} bytes; expected a session of at most {LARGEST}")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"{path} is no session ({str(error)[:100]}); expected a file that /save wrote") from error
    if not isinstance(content, dict):
        raise ArgumentError(f"{path} holds a JSON {type(content).__name__}; expected a file that /save wrote")
    return content


def _check_messages(path: Path, messages: Any) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ArgumentError(f"{path} has messages that are a {type(messages).__name__}; expected a list")
    for i, message in enumerate(messages, 1):
        sound = isinstance(message, dict) and isinstance(message.get("content"), str) and message.get("role") in ROLES
        if not sound:
            raise ArgumentError(
                f"{path}: message {i} is {str(message)[:80]!r}; expected a content, and a role of {', '.join(ROLES)}"
            )
