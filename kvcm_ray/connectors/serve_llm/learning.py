"""Block keys of prompts, made by a thread after the prompts were routed.

Turning text into block keys takes milliseconds, so no decision waits for it. What was learned of one prompt
serves the next that begins the same: the next turn of a conversation, another question about a document.
A prompt whose beginning this router has not seen is routed as if the shared cache had nothing of it.

Keys are a hint. One that is wrong (another tokenizer, an engine of another version) is not found in the
index, and the prompt is routed by load.
"""

from __future__ import annotations

import bisect
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kvcm_ray.connectors.keys import keys_of_hashes
from kvcm_ray.connectors.serve_llm.prompts import PIECE, Prompt
from kvcm_ray.connectors.serve_llm.settings import RouterSettings
from kvcm_ray.connectors.serve_llm.shared import LOOK_S, SharedIndex
from kvcm_ray.connectors.serve_llm.table import PrefixTable
from kvcm_ray.core.requests import Keys

log = logging.getLogger(__name__)

WAITING_MAX = 256  #: prompts; more are not learned
_TOKENS_PIECE = 32


class Learner:
    """Fills `table` with keys of prompts, and keeps `index` open. `start` begins; a daemon thread."""

    def __init__(self, settings: RouterSettings, table: PrefixTable, index: SharedIndex) -> None:
        self._settings = settings
        self._table = table
        self._index = index
        self._tokenizer: Any = None
        self._hash: BlockHashes | None = None
        self._waiting: queue.Queue[Prompt | None] = queue.Queue(WAITING_MAX)
        self._ended = threading.Event()
        self._told = ""

    def start(self) -> None:
        threading.Thread(target=self._run, name="kvcm-router", daemon=True).start()

    def close(self) -> None:
        self._ended.set()

    def learn(self, prompt: Prompt) -> None:
        """Later, if there is time. Never waits."""
        if prompt.is_special or not prompt.hashes or not (prompt.tokens or self._settings.tokenizer):
            return
        try:
            self._waiting.put_nowait(prompt)
        except queue.Full:
            log.debug("a prompt was not learned: too many wait")

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                prompt = self._waiting.get(timeout=LOOK_S)
            except queue.Empty:
                prompt = None
            try:
                self._index.open()
                if prompt is not None and self._index.info is not None:
                    self.learn_now(prompt, self._index.info.block_size)
            except Exception as error:  # a tokenizer or an engine's hashes: whatever they raise
                if str(error) != self._told:
                    self._told = str(error)
                    log.warning("kvcm: prompts are not looked up in the shared cache: %s", error)

    def learn_now(self, prompt: Prompt, block_tokens: int) -> None:
        """What `learn` does, in this thread. Raises whatever the tokenizer raises."""
        if self._hash is None:
            self._hash = BlockHashes(self._settings.hash_algorithm)
        tokens, ends = self._tokens(prompt)
        keys = self._hash.keys(tokens, self._settings.hash_tokens or block_tokens, block_tokens)
        counts = [min(end // block_tokens, len(keys)) for end in ends]
        self._table.learned(prompt.hashes, keys, counts)

    def _tokens(self, prompt: Prompt) -> tuple[Sequence[int], list[int]]:
        """A prompt's token ids, and how many of them end with each piece."""
        if prompt.tokens:
            return prompt.tokens, [_TOKENS_PIECE * (piece + 1) for piece in range(len(prompt.hashes))]
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self._settings.tokenizer)
        rendered = self._rendered(prompt)
        encoded = self._tokenizer(
            rendered, return_offsets_mapping=True,
            add_special_tokens=prompt.add_special_tokens and not prompt.messages,
        )  # fmt: skip
        ends_of_tokens = [end for _, end in encoded["offset_mapping"]]
        places = list(places_of_pieces(prompt, rendered))
        return encoded["input_ids"], [bisect.bisect_right(ends_of_tokens, place) for place in places]

    def _rendered(self, prompt: Prompt) -> str:
        if not prompt.messages:
            return prompt.text
        messages = [{"role": role, "content": text} for role, text in prompt.messages]
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def places_of_pieces(prompt: Prompt, rendered: str) -> Iterator[int]:
    """Where in `rendered`, the prompt as its template writes it, each of its pieces ends.

    Ends where the template changed a message's text, so that its pieces cannot be found.
    """
    if not prompt.messages:
        yield from (PIECE * (piece + 1) for piece in range(len(prompt.hashes)))
        return
    begin, position, piece = 0, 0, 1  # of the message in the spoken text, and in the rendered one
    for role, text in prompt.messages:
        begin += len(role) + 2
        found = rendered.find(text, position)
        if found < 0:
            return
        while piece <= len(prompt.hashes) and PIECE * piece <= begin + len(text):
            yield max(position, found + PIECE * piece - begin)
            piece += 1
        begin += len(text)
        position = found + len(text)


class BlockHashes:
    """vLLM's block hashes of plain prompts, by vLLM's own functions. Raises ImportError without vLLM."""

    def __init__(self, algorithm: str) -> None:
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core import kv_cache_utils

        self._hash: Callable[[Any], bytes] = get_hash_fn_by_name(algorithm)
        kv_cache_utils.init_none_hash(self._hash)
        self._one: Callable[..., bytes] = kv_cache_utils.hash_block_tokens

    def keys(self, tokens: Sequence[int], hash_tokens: int, block_tokens: int) -> Keys:
        """Keys of a prompt's full blocks, as the connector makes them of the engine's hashes."""
        found: list[bytes] = []
        parent: bytes | None = None
        for begin in range(0, len(tokens) - hash_tokens + 1, hash_tokens):
            parent = self._one(self._hash, parent, tokens[begin : begin + hash_tokens])
            found.append(parent)
        step = block_tokens // hash_tokens
        return keys_of_hashes(found[step - 1 :: step])
