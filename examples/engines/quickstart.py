"""A long document and two questions to a real small model; the second one does not read the document again.

    make setup-engines
    .venv-engines/bin/python examples/engines/quickstart.py [TOKENS]

Prints the time to the first token with and without the cache, and whether the answers are the same. (They
are; whether they are *good* is another matter: it is a model of 135 million parameters.) The document is the
beginning of this project's docs/design.md, 2200 tokens if not said otherwise. KVCM_URL names a running
manager; without it one is started for the time being.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache

from kvcm_ray import cluster
from kvcm_ray.client import connect
from kvcm_ray.connectors.transformers import ModelCache
from kvcm_ray.testing import smollm2

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "design.md"
DOCUMENT_TOKENS = int(sys.argv[1]) if len(sys.argv) > 1 else 2200
QUESTIONS = ("What is each Instance Group?", "What is kept in LMDB?")
ANSWER_TOKENS = 24


@contextlib.contextmanager
def manager_url() -> Iterator[str]:
    if "KVCM_URL" in os.environ:
        yield os.environ["KVCM_URL"]
        return
    with tempfile.TemporaryDirectory(prefix="kvcm-quickstart-") as folder:
        started = cluster.up_detached(Path(folder) / "data", 0, ("shm:1GiB",), replicas=1)
        try:
            yield started.url
        finally:
            cluster.down(started.data_dir, purge=True)


def prompts(tokenizer: Any) -> list[list[int]]:
    """Document and question, as the model's chat template has them: equal up to the question."""
    ids = tokenizer(DOCUMENT.read_text(), add_special_tokens=False)["input_ids"]
    document = tokenizer.decode(ids[:DOCUMENT_TOKENS])
    chats = [
        [{"role": "user", "content": f"{document}\n\nAnswer in one sentence. {question}"}]
        for question in QUESTIONS
    ]
    return [
        tokenizer(
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
            add_special_tokens=False,
        )["input_ids"]
        for chat in chats
    ]


def go_on(model: Any, first: int, past: DynamicCache) -> list[int]:
    """The greedy answer that begins with the token `first`."""
    answer = [first]
    with torch.inference_mode():
        while len(answer) < ANSWER_TOKENS and answer[-1] != model.config.eos_token_id:
            out = model(torch.tensor([answer[-1:]]), past_key_values=past, use_cache=True)
            answer.append(int(out.logits[0, -1].argmax()))
    return answer


def without_cache(model: Any, prompt: list[int]) -> tuple[float, list[int]]:
    """Seconds to the first token, and the answer."""
    begin_s = time.perf_counter()
    with torch.inference_mode():
        out = model(torch.tensor([prompt]), past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)
    first = int(out.logits[0, -1].argmax())
    return time.perf_counter() - begin_s, go_on(model, first, out.past_key_values)


def with_cache(cache: ModelCache, prompt: list[int]) -> tuple[float, float, int, list[int]]:
    """Seconds to the first token, seconds to store what is new, tokens from the cache, the answer."""
    begin_s = time.perf_counter()
    found = cache.load(prompt)
    rest = torch.tensor([prompt[found.tokens :]])
    with torch.inference_mode():
        out = cache.model(rest, past_key_values=found.past, use_cache=True, logits_to_keep=1)
    first = int(out.logits[0, -1].argmax())
    ttft_s = time.perf_counter() - begin_s
    cache.save(prompt, out.past_key_values)
    store_s = time.perf_counter() - begin_s - ttft_s
    return ttft_s, store_s, found.tokens, go_on(cache.model, first, out.past_key_values)


def main() -> None:
    folder = smollm2.folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    questions = prompts(tokenizer)
    without_cache(model, questions[0][:64])  # the first run of a model is slow for reasons of its own
    with manager_url() as url, connect(url) as client:
        cache = ModelCache(client, model, "quickstart-smollm2")
        print(f"{model.num_parameters() / 1e6:.0f} M parameters, {torch.get_num_threads()} threads\n")
        for question, prompt in zip(QUESTIONS, questions, strict=True):
            plain_s, expected = without_cache(model, prompt)
            cached_s, store_s, tokens, answer = with_cache(cache, prompt)
            print(f"{question}  ({len(prompt)} tokens)")
            print(f"  first token without cache   {plain_s * 1000:8.0f} ms")
            print(f"  first token with cache      {cached_s * 1000:8.0f} ms, {tokens} tokens from the cache")
            print(f"  storing what was new        {store_s * 1000:8.0f} ms")
            print(f"  the same answer             {'yes' if answer == expected else 'NO':>8}")
            print(f"  answer: {tokenizer.decode(answer, skip_special_tokens=True).strip()!r}\n")


if __name__ == "__main__":
    main()
