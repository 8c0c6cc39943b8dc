"""The load of `kvcm bench serve-llm`: agents that talk about documents, over the OpenAI API.

Each document begins the prompts of several users, who all start at the same time and then go on with
conversations of their own; each turn sends all of it again. That is what parallel agents, or people with one
manual, do. Words are random, so that all rows of a comparison can have the same ones.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

MODEL_ID = "served"
ANSWER_S = 300.0
THINK_S = 0.5  #: between an answer and the next question
TEXT = (
    "the cache holds blocks of keys and values that engines computed once and others may read again when a "
    "prompt begins with the same words so a document is read one time and asked many questions by many people"
)


@dataclass(frozen=True, slots=True)
class Plan:
    documents: int = 6
    users: int = 3  #: of each document
    turns: int = 3
    document_words: int = 1200  #: about a token each, of a tokenizer that knows English
    turn_words: int = 60
    answer_tokens: int = 12
    seed: int = 0


@dataclass(slots=True)
class Talk:
    """What the users saw."""

    first_s: list[float] = field(default_factory=list)  #: to the first token, of first turns
    later_s: list[float] = field(default_factory=list)  #: of the others
    failed: int = 0
    error: str = ""  #: the last failure


def talk(url: str, plan: Plan) -> Talk:
    """All users at the same time; returns when the last conversation is over."""
    result, lock = Talk(), threading.Lock()
    threads = [
        threading.Thread(target=_user, args=(url, plan, document, user, result, lock))
        for user in range(plan.users)
        for document in range(plan.documents)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return result


def _user(url: str, plan: Plan, document: int, user: int, result: Talk, lock: Any) -> None:
    system = _words(np.random.default_rng([plan.seed, document]), plan.document_words)
    chance = np.random.default_rng([plan.seed, document, user])
    messages = [{"role": "system", "content": system}]
    with httpx.Client(timeout=ANSWER_S) as client:
        for turn in range(plan.turns):
            messages.append({"role": "user", "content": _words(chance, plan.turn_words)})
            try:
                ttft, answer = _ask(client, url, messages, plan.answer_tokens)
            except (httpx.HTTPError, ValueError, KeyError) as error:
                with lock:
                    result.failed += 1
                    result.error = repr(error)
                return
            with lock:
                (result.later_s if turn else result.first_s).append(ttft)
            messages.append({"role": "assistant", "content": answer})
            time.sleep(THINK_S)


def _ask(
    client: httpx.Client, url: str, messages: Sequence[dict[str, str]], answer_tokens: int
) -> tuple[float, str]:
    """Seconds to the first token, and the answer."""
    body = {
        "model": MODEL_ID, "messages": list(messages), "max_tokens": answer_tokens, "temperature": 0,
        "stream": True,
    }  # fmt: skip
    begin, first, parts = time.perf_counter(), 0.0, []
    with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            data = line.removeprefix("data:").strip()
            if not line.startswith("data:") or data == "[DONE]":
                continue
            choices = json.loads(data)["choices"]
            if text := (choices[0]["delta"].get("content") if choices else None):
                first = first or time.perf_counter()
                parts.append(text)
    if not parts:
        raise ValueError("an answer without text")
    return first - begin, "".join(parts)


def _words(chance: np.random.Generator, count: int) -> str:
    words = TEXT.split()
    return " ".join(words[number] for number in chance.integers(0, len(words), count))
