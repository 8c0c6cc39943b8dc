"""The prompt of a request, and its pieces.

A prompt is cut into pieces of `PIECE` characters (32 tokens of one given as token ids), and the hash of a
piece names everything up to its end, also the model, the salt and the tools that were given: two prompts have
the hashes of their common prefix in common, and nothing else. A rest that fills no piece does not count;
neither does what is behind `PIECES_MAX` pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

PIECE = 128  #: characters
PIECES_MAX = 512

_TOKENS_PIECE = 4 * 32  #: bytes: 32 tokens of 4
#: Of a request for a chat: they change how a template writes the messages.
_TEMPLATE_INPUTS = ("tools", "documents", "chat_template", "chat_template_kwargs", "continue_final_message")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: `text`, a conversation's `messages`, or `tokens`."""

    text: str = ""
    messages: tuple[tuple[str, str], ...] = ()  #: role and text
    tokens: tuple[int, ...] = ()
    model: str = ""
    #: Blocks depend on something that is not in the tokens, so they cannot be looked up.
    is_special: bool = False
    special: str = ""  #: what that is, in words
    add_special_tokens: bool = True
    hashes: list[int] = field(default_factory=list)  #: of the pieces, filled by `prompt_of`

    @property
    def spoken(self) -> str:
        """All texts, each message with its role before it."""
        if self.messages:
            return "".join(f"\x1e{role}\x1f{text}" for role, text in self.messages)
        return self.text


def prompt_of(args: Sequence[Any]) -> Prompt | None:
    """The prompt of a request with these arguments; None if it has none, or several.

    Raises nothing for whatever a client may have sent: what is not understood is no prompt.
    """
    for arg in args:
        for name, make in (("messages", _conversation), ("prompt", _completion)):
            value = _get(arg, name)
            if value:
                prompt = make(arg, value)
                if prompt is not None:
                    prompt.hashes.extend(_hashes(prompt))
                return prompt
    return None


def _get(arg: Any, name: str) -> Any:
    return arg.get(name) if isinstance(arg, dict) else getattr(arg, name, None)


def _completion(arg: Any, value: Any) -> Prompt | None:
    facts = _facts(arg)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        with_special = _get(arg, "add_special_tokens")
        return Prompt(text=value, add_special_tokens=with_special is not False, **facts)
    if isinstance(value, list) and all(type(token) is int and 0 <= token < 2**32 for token in value):
        return Prompt(tokens=tuple(value), **facts)
    return None


def _conversation(arg: Any, value: Any) -> Prompt | None:
    if not isinstance(value, list | tuple):
        return None
    spoken = [_message(message) for message in value]
    added = "".join(repr(_get(arg, name)) for name in _TEMPLATE_INPUTS if _get(arg, name))
    facts = _facts(arg, added)
    facts["is_special"] = facts["is_special"] or not all(plain for _, _, plain in spoken)
    return Prompt(messages=tuple((role, text) for role, text, _ in spoken), **facts)


def _message(message: Any) -> tuple[str, str, bool]:
    """Role, text, and whether there is nothing but text; what else there is stands in the text as Python."""
    role, content = str(_get(message, "role") or ""), _get(message, "content")
    calls = _get(message, "tool_calls")
    if isinstance(content, list) and all(_get(part, "type") == "text" for part in content):
        content = "\n".join(str(_get(part, "text")) for part in content)
    plain = (content is None or isinstance(content, str)) and not calls
    text = content if isinstance(content, str) else "" if content is None else repr(content)
    return role, text + (repr(calls) if calls else ""), plain


def _facts(arg: Any, special: str = "") -> dict[str, Any]:
    """`special`: in words, what else than the text the blocks of all of the prompt depend on."""
    salt = _get(arg, "cache_salt")
    special += f"\x1e{salt}" if salt else ""
    return {"model": str(_get(arg, "model") or ""), "is_special": bool(special), "special": special}


def _hashes(prompt: Prompt) -> list[int]:
    running = xxhash.xxh3_64(f"{prompt.model}\x1e{prompt.special}\x1e".encode("utf-8", "replace"))
    data: bytes | str
    if prompt.tokens:
        data, size = np.array(prompt.tokens, "<u4").tobytes(), _TOKENS_PIECE
    else:
        data, size = prompt.spoken, PIECE
    found = []
    for piece in range(min(len(data) // size, PIECES_MAX)):
        part = data[piece * size : (piece + 1) * size]
        running.update(part if isinstance(part, bytes) else part.encode("utf-8", "replace"))
        found.append(running.intdigest())
    return found
