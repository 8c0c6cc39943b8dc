"""Real vLLM engines in processes of their own, and tiny models made on the spot.

Needs the engines' environment (``make setup-engines``); one engine runs at a time, on one thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

START_S = 600.0
ANSWER_S = 240.0
VOCABULARY = 1024


class Engine:
    """One vLLM engine with the connector (or none), in a process of its own."""

    def __init__(
        self, model: Path, log: Path, connector: dict[str, Any] | None, *,
        module: str = "kvcm_ray.connectors.vllm", **settings: Any,
    ) -> None:  # fmt: skip
        arguments = {
            "model": str(model), "skip_tokenizer_init": True, "block_size": 32, "enforce_eager": True,
            "dtype": "float32", "max_model_len": 4096, "max_num_batched_tokens": 1024,
            "enable_prefix_caching": False, "disable_log_stats": False, "seed": 0,
            "distributed_executor_backend": "uni",
        } | settings  # fmt: skip
        if connector is not None:
            arguments["kv_transfer_config"] = {
                "kv_connector": "KVCMConnector", "kv_connector_module_path": module,
                "kv_role": "kv_both", "kv_connector_extra_config": connector,
            }  # fmt: skip
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }  # fmt: skip
        environment.pop("PYTHONHASHSEED", None)
        self.log = log
        self._file = log.open("a")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvcm_ray.testing.vllm_child", json.dumps(arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._file, text=True,
            env=environment, start_new_session=True,
        )  # fmt: skip
        self._answer(START_S)

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int = 8) -> list[dict[str, Any]]:
        """For each prompt: ``tokens``, ``cached`` (tokens not computed), ``finish``, ``ttft_s``."""
        plain = [[int(token) for token in prompt] for prompt in prompts]
        answer: list[dict[str, Any]] = self._ask(
            {"do": "generate", "prompts": plain, "max_tokens": max_tokens}
        )
        return answer

    def one(self, prompt: Sequence[int], max_tokens: int = 8) -> dict[str, Any]:
        return self.generate([prompt], max_tokens)[0]

    def metrics(self) -> dict[str, float]:
        found: dict[str, float] = self._ask({"do": "metrics"})
        return found

    def reset(self) -> bool:
        return bool(self._ask({"do": "reset"}))

    def call(self, function: str, **arguments: Any) -> Any:
        """What ``module:name`` says of ``(llm, **arguments)`` in the engine's process; all of it as JSON."""
        return self._ask({"do": "call", "function": function, "arguments": arguments})

    def close(self) -> None:
        """Ends the engine and its own children (its process group)."""
        with contextlib.suppress(BrokenPipeError, OSError, AssertionError):
            self._ask({"do": "end"})
        end_group(self._process, 20)
        self._file.close()

    def _ask(self, command: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer(ANSWER_S)

    def _answer(self, timeout_s: float) -> Any:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        line = self._process.stdout.readline() if ready else ""
        assert line, f"the engine did not answer; {self.log} ends with\n{self.log.read_text()[-4000:]}"
        return json.loads(line)


@contextlib.contextmanager
def engine(
    model: Path, log: Path, connector: dict[str, Any] | None = None, **settings: Any
) -> Iterator[Engine]:
    started = Engine(model, log, connector, **settings)
    try:
        yield started
    finally:
        started.close()


def llama(
    folder: Path, *, layers: int = 4, hidden: int = 256, seed: int = 0, vocabulary: int = VOCABULARY
) -> Path:
    """A random Llama whose greedy outputs vary, with real weights on disk."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 128), head_dim=64,
        max_position_embeddings=8192, initializer_range=0.12, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).float().save_pretrained(folder)
    return folder


def olmo3(folder: Path) -> Path:
    """Random Olmo 3: layers of sliding windows (128 tokens) and full ones, in several groups."""
    import torch
    from transformers import Olmo3Config, Olmo3ForCausalLM

    torch.manual_seed(3)
    config = Olmo3Config(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=128,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        max_position_embeddings=8192, initializer_range=0.12, tie_word_embeddings=False,
    )  # fmt: skip
    Olmo3ForCausalLM(config).float().save_pretrained(folder)
    return folder


def lfm2(folder: Path) -> Path:
    """Random LFM 2: layers of short convolutions, which keep a state, and full attention."""
    import torch
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(5)
    config = Lfm2Config(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, layer_types=["conv", "full_attention"] * 2,
        max_position_embeddings=8192, initializer_range=0.12, tie_word_embeddings=False,
        block_auto_adjust_ff_dim=False, conv_dim=256, block_dim=256, block_norm_eps=1e-5,
    )  # fmt: skip
    Lfm2ForCausalLM(config).float().save_pretrained(folder)
    return folder


def deepseek(folder: Path) -> Path:
    """Random DeepSeek V2 without experts: latent attention (MLA)."""
    import torch
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    torch.manual_seed(4)
    config = DeepseekV2Config(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=512, q_lora_rank=None,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, first_k_dense_replace=4,
        max_position_embeddings=8192, initializer_range=0.1, n_routed_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=64,
    )  # fmt: skip
    DeepseekV2ForCausalLM(config).float().save_pretrained(folder)
    return folder


def tokens(seed: int, count: int) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(3, VOCABULARY, count).tolist()
    return found


def end_group(leader: subprocess.Popen[Any], timeout_s: float) -> None:
    """Give a process that was told to end so long, then kill what is left of its process group."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        leader.wait(timeout_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGKILL)
    leader.wait()


def wait_until(true: Any, timeout_s: float = 20.0, what: str = "it") -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.05)
