"""Logs of prompts to traces without prompts.

A log is JSON lines, plain or gzip. A line has the prompt as one of

    token_ids   a list of token ids
    prompt      text, or a list of token ids
    text        text
    messages    chat messages with role and content; no template is applied

and may have timestamp (seconds), output_tokens, turn, and the labels instance, model and class. Requests
of different models share no blocks.

What comes out are keys: a keyed hash (BLAKE2b) of each block and all blocks before it. The salt is random
and kept nowhere, so that nobody can try texts out; whoever gives a salt, to make keys of several logs match,
must keep it secret. Labels are hashed likewise. What stays to be seen are lengths, times, and what is
repeated.

Text becomes tokens by a tokenizer if one is given. Otherwise 4 bytes, or a word, count as a token: hit
ratios hardly depend on it, but token counts are rough.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from kvcm_ray.errors import InvalidArgument, Unsupported
from kvcm_ray.traces import files
from kvcm_ray.traces.batch import Batch
from kvcm_ray.traces.formats import REQUEST
from kvcm_ray.traces.writing import header, write_trace

TEXT_TOKEN_BYTES = 4  #: of text that count as a token
UNITS = ("bytes", "words")
_STATE_BYTES = 16
_WORD = re.compile(r"\s*\S+|\s+$")

Pieces = Sequence[bytes]  #: what is hashed of each token
Tokenize = Callable[[str], Pieces]


class Anonymizer:
    """Makes a trace of a log; see the module.

    Args:
        block_tokens: tokens of a block. The last block of a prompt may have fewer.
        salt: secret; a random one by default.
        tokenize: text to tokens: `by_bytes`, `by_words`, or what `tokenizer` gives.
        from_zero: let the first request be at time 0.

    Raises:
        InvalidArgument: no such block size.
    """

    def __init__(
        self, block_tokens: int = 16, salt: str = "", tokenize: Tokenize | None = None, from_zero: bool = True
    ) -> None:
        if block_tokens < 1:
            raise InvalidArgument(f"a block has at least one token, got {block_tokens}")
        self._block_tokens = block_tokens
        self._tokenize = tokenize or by_bytes
        self._from_zero = from_zero
        self._key = hashlib.blake2b(salt.encode()).digest() if salt else secrets.token_bytes(64)
        self._first_s: float | None = None
        self._seen = 0

    def run(self, log: Path, out: str | Path) -> None:
        """Read a log, write a trace.

        Raises:
            InvalidArgument: a bad line, which is named, or a file that cannot be read or written. Then
                `out` stays as it was.
        """
        write_trace(out, header(self._block_tokens), self._batches(log))

    def _batches(self, log: Path) -> Iterator[Batch]:
        first = 1
        with files.open_lines(log) as stream:
            while lines := stream.read(files.READ_BYTES):
                rows = []
                for number, line in enumerate(lines, first):
                    try:
                        if not line.isspace():
                            rows.append(self._row(orjson.loads(line)))
                    except files.BAD_RECORD as error:
                        raise files.bad_line(log, number, error) from error
                first += len(lines)
                yield _batch(rows, self._block_tokens)
            if stream.cut:
                raise files.cut_off(log)
        if not self._seen:
            raise InvalidArgument(f"the log {log} is empty")

    def _row(self, record: Any) -> _Row:
        if type(record) is not dict:
            raise ValueError(f"a request is a JSON object, not {type(record).__name__}")
        pieces = self._pieces(record)
        labels = [_label(record, name) for name in ("instance", "model")]
        instance = self._named("\0".join(labels)) if any(labels) else ""
        kind = _label(record, "class")
        return _Row(
            self._keys(pieces, "\0".join(labels)), len(pieces), self._time_s(record),
            _whole(record, "output_tokens"), _whole(record, "turn"), instance,
            self._named(kind) if kind else "",
        )  # fmt: skip

    def _pieces(self, record: dict[str, Any]) -> Pieces:
        found = [name for name in ("token_ids", "prompt", "text", "messages") if name in record]
        if len(found) != 1:
            fields = ", ".join(record)
            raise ValueError(f"exactly one of token_ids, prompt, text, messages is needed; it has {fields}")
        value = record[found[0]]
        if found[0] == "messages":
            value = _chat(value)
        if type(value) is str and found[0] != "token_ids":
            return self._tokenize(value)
        if type(value) is list and all(type(token) is int for token in value) and found[0] != "text":
            return [token.to_bytes(8, "little", signed=True) for token in value]
        kinds = {"token_ids": "a list of token ids", "text": "text"}
        raise ValueError(f"{found[0]} must be {kinds.get(found[0], 'text or a list of token ids')}")

    def _keys(self, pieces: Pieces, start: str) -> list[int]:
        """The first half of each state; a state hashes the one before it and the block."""
        state = self._hash(start.encode())
        keys = []
        for begin in range(0, len(pieces), self._block_tokens):
            block = pieces[begin : begin + self._block_tokens]
            state = self._hash(state + b"".join(len(piece).to_bytes(4, "little") + piece for piece in block))
            keys.append(int.from_bytes(state[:8], "little", signed=True))
        return keys

    def _named(self, label: str) -> str:
        return self._hash(b"label" + label.encode())[:4].hex()

    def _hash(self, data: bytes) -> bytes:
        return hashlib.blake2b(data, digest_size=_STATE_BYTES, key=self._key).digest()

    def _time_s(self, record: dict[str, Any]) -> float:
        """A second after another where the log does not say."""
        self._seen += 1
        time_s = record.get("timestamp", float(self._seen - 1))
        if type(time_s) not in (int, float):
            raise ValueError("timestamp must be a number of seconds")
        if self._first_s is None:
            self._first_s = time_s if self._from_zero else 0.0
        return float(time_s - self._first_s)


@dataclass(frozen=True, slots=True)
class _Row:
    keys: list[int]
    tokens: int
    time_s: float
    output_tokens: int
    turn: int
    instance: str
    kind: str


def _batch(rows: Sequence[_Row], block_tokens: int) -> Batch:
    tokens = np.array([row.tokens for row in rows], np.int64)
    return Batch(
        keys=np.array([key for row in rows for key in row.keys], np.int64),
        counts=np.array([len(row.keys) for row in rows], np.int64),
        times_s=np.array([row.time_s for row in rows], np.float64),
        input_tokens=tokens,
        output_tokens=np.array([row.output_tokens for row in rows], np.int64),
        partial=tokens % block_tokens > 0,
        ops=np.full(len(rows), REQUEST, np.uint8),
        turns=np.array([row.turn for row in rows], np.int64),
        instances=[row.instance for row in rows],
        classes=[row.kind for row in rows],
    )


def _whole(record: dict[str, Any], name: str) -> int:
    value = record.get(name, 0)
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} must be a whole number, not negative")
    return value


def _label(record: dict[str, Any], name: str) -> str:
    value = record.get(name, "")
    if type(value) is not str:
        raise ValueError(f"{name} must be a string")
    return value


def _chat(messages: Any) -> str:
    """One text of all messages; what is no text in them, as images, is left out."""
    if type(messages) is not list or not all(type(message) is dict for message in messages):
        raise ValueError("messages must be a list of objects with role and content")
    texts = []
    for message in messages:
        content = message.get("content") or ""
        parts = content if type(content) is list else [{"text": content}]
        text = "".join(part["text"] for part in parts if "text" in part)
        texts.append(f"{message['role']}\n{text}\n")
    return "".join(texts)


# ----------------------------------------------------------------------------------- text to tokens


def by_bytes(text: str) -> Pieces:
    data = text.encode()
    return [data[at : at + TEXT_TOKEN_BYTES] for at in range(0, len(data), TEXT_TOKEN_BYTES)]


def by_words(text: str) -> Pieces:
    """A word has the blanks before it."""
    return [word.encode() for word in _WORD.findall(text)]


def tokenizer(file: str | Path) -> Tokenize:
    """Of a ``tokenizer.json``, without special tokens.

    Raises:
        Unsupported: the package tokenizers is not installed.
        InvalidArgument: the file is no tokenizer.
    """
    try:
        import tokenizers  # type: ignore[import-not-found,unused-ignore]
    except ModuleNotFoundError:
        raise Unsupported("a tokenizer file needs the package tokenizers: pip install tokenizers") from None
    try:
        loaded = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises plain Exception
        raise InvalidArgument(f"cannot read the tokenizer {file}: {error}") from error

    def tokenize(text: str) -> Pieces:
        ids = loaded.encode(text, add_special_tokens=False).ids
        return [token.to_bytes(8, "little", signed=True) for token in ids]

    return tokenize
