"""A forgiving JSON reader for the few clients that need one.

Accepts what the protocol's own tokenizer accepts beyond strict JSON: single quotes, unquoted keys
and a trailing comma. It is used only after `orjson` refused a text, so its speed does not matter;
its depth and its input are bounded by the caller.
"""

from __future__ import annotations

import re
from typing import Any

DEPTH_MAX = 100
_SPACE = re.compile(r"[ \t\r\n]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?(?![\w.])")
_NAME = re.compile(r"[A-Za-z_$][A-Za-z0-9_$]*")
_PLAIN = {'"': re.compile(r'[^"\\\x00-\x1f]*'), "'": re.compile(r"[^'\\\x00-\x1f]*")}
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"} | {c: c for c in "\"'\\/"}
_WORDS = {"true": True, "false": False, "null": None}
_HEX = re.compile(r"[0-9a-fA-F]{4}")


class LenientError(ValueError):
    """The text is not JSON even in the forgiving sense."""


def loads(text: str) -> Any:
    """Parse one value that fills the whole text.

    Raises:
        LenientError: bad syntax, or nested deeper than `DEPTH_MAX`.
    """
    reader = _Reader(text)
    value = reader.value(0)
    if reader.peek():
        raise reader.error("nothing more")
    return value


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def error(self, expected: str) -> LenientError:
        return LenientError(f"expected {expected} at character {self._at}")

    def peek(self) -> str:
        """Next character that is not white space, "" at the end."""
        self._at = self._match(_SPACE).end()
        return self._text[self._at : self._at + 1]

    def value(self, depth: int) -> Any:
        if depth > DEPTH_MAX:
            raise LenientError(f"nested deeper than {DEPTH_MAX}")
        char = self.peek()
        if char == "{":
            return self._object(depth)
        if char == "[":
            return self._array(depth)
        if char in _PLAIN:
            return self._string(char)
        if number := _NUMBER.match(self._text, self._at):
            self._at = number.end()
            return _number(number.group())
        name = self._name()
        if name not in _WORDS:
            raise self.error("a value")
        return _WORDS[name]

    def _object(self, depth: int) -> dict[str, Any]:
        self._at += 1
        result: dict[str, Any] = {}
        while (char := self.peek()) != "}":
            key = self._string(char) if char in _PLAIN else self._name()
            self._expect(":")
            result[key] = self.value(depth + 1)
            if self.peek() != "}":
                self._expect(",")
        self._at += 1
        return result

    def _array(self, depth: int) -> list[Any]:
        self._at += 1
        result: list[Any] = []
        while self.peek() != "]":
            result.append(self.value(depth + 1))
            if self.peek() != "]":
                self._expect(",")
        self._at += 1
        return result

    def _expect(self, char: str) -> None:
        if self.peek() != char:
            raise self.error(repr(char))
        self._at += 1

    def _name(self) -> str:
        name = _NAME.match(self._text, self._at)
        if not name:
            raise self.error("a value or a name")
        self._at = name.end()
        return name.group()

    def _string(self, quote: str) -> str:
        if quote not in _PLAIN or not quote:
            raise self.error("a string")
        self._at += 1
        parts = []
        while True:
            plain = self._match(_PLAIN[quote])
            parts.append(plain.group())
            self._at = plain.end()
            char = self._text[self._at : self._at + 1]
            if char == quote:
                self._at += 1
                return _without_surrogates("".join(parts))
            if char != "\\":
                raise self.error(f"the closing {quote}")
            parts.append(self._escape())

    def _escape(self) -> str:
        code = self._text[self._at + 1 : self._at + 2]
        self._at += 2
        if code in _ESCAPES and code:
            return _ESCAPES[code]
        hexadecimal = _HEX.match(self._text, self._at)
        if code != "u" or not hexadecimal:
            raise self.error("an escape sequence")
        self._at = hexadecimal.end()
        return chr(int(hexadecimal.group(), 16))

    def _match(self, pattern: re.Pattern[str]) -> re.Match[str]:
        found = pattern.match(self._text, self._at)
        assert found is not None  # both kinds of pattern match the empty string
        return found


def _without_surrogates(text: str) -> str:
    """Join surrogate pairs; a lone one is no character."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError as error:
        raise LenientError("a lone surrogate") from error


def _number(text: str) -> int | float:
    if text.lstrip("-").isdigit():
        if len(text) > 400:
            raise LenientError("a number of more than 400 digits")
        return int(text)
    return float(text)
