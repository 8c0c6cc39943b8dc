"""Real weights: SmolLM2-135M reads a document once, and answers two questions about it."""

from __future__ import annotations

from pathlib import Path

from kvcm_ray.cluster import Manager
from kvcm_ray.testing.engines import engine, wait_until

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = ("What is each Instance Group?", "What is kept in LMDB?")
DOCUMENT_TOKENS, ANSWER_TOKENS = 2200, 24


def prompts(model: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer((ROOT / "docs" / "design.md").read_text(), add_special_tokens=False)["input_ids"]
    document = tokenizer.decode(ids[:DOCUMENT_TOKENS])
    found = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": f"{document}\n\nAnswer in one sentence. {question}"}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        found.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return found


def test_two_questions_to_one_document(running: Manager, smollm2: Path, tmp_path: Path) -> None:
    first, second = prompts(smollm2)
    shared = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    with engine(smollm2, tmp_path / "log") as plain:
        plain.one(first[:64], 1)  # warms the engine up
        cold = [plain.one(prompt, ANSWER_TOKENS) for prompt in (first, second)]
    settings = {"kvcm_data_dir": str(running.data_dir), "instance_id": "smollm2"}
    with engine(smollm2, tmp_path / "log", settings) as found:
        assert found.one(first, ANSWER_TOKENS)["tokens"] == cold[0]["tokens"]
        wait_until(lambda: found.one(first, 1)["cached"] == len(first) // 32 * 32, 60, "a full hit")
        warm = found.one(second, ANSWER_TOKENS)
    assert warm["cached"] == shared // 32 * 32 > DOCUMENT_TOKENS * 0.9
    assert warm["tokens"] == cold[1]["tokens"]
    assert warm["ttft_s"] < cold[1]["ttft_s"] / 2
    print(f"{len(second)} tokens, {len(second) - warm['cached']} computed, time to first token "
          f"{cold[1]['ttft_s']:.2f} s without, {warm['ttft_s']:.2f} s with the cache")  # fmt: skip
