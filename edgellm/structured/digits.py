"""Digits in a row, in JSON as it is written: no schema bounds how many a number has, so a model may never end one."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from edgellm.arrays import U8

MOST = 20
"""In a row, outside strings: 2 ** 64 has as many, and a float64 is told by 17. llama.cpp's grammars have 16."""
DIGITS, QUOTE, BACKSLASH = frozenset(b"0123456789"), ord('"'), ord("\\")


def leading(tokens: Iterable[bytes]) -> U8:
    """(tokens,) uint8: with how many digits each begins, at most 255."""
    return np.array([min(255, len(token) - len(token.lstrip(b"0123456789"))) for token in tokens], np.uint8)


class Digits:
    """What of the JSON so far its next digits follow."""

    def __init__(self) -> None:
        self.in_a_row = 0
        self._in_string = self._is_escaped = False

    def push(self, token: bytes) -> None:
        for byte in token:
            if self._in_string:
                self._in_string = byte != QUOTE or self._is_escaped
                self._is_escaped = byte == BACKSLASH and not self._is_escaped
            else:
                self.in_a_row = self.in_a_row + 1 if byte in DIGITS else 0
                self._in_string = byte == QUOTE
