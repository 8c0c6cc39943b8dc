"""What blocks depend on, as the name of an instance: two engines share blocks only if all of it is equal.

Token ids, LoRA adapters and images are in the engine's block hashes. Weights, data types, the model's
configuration and the physical order of the cache are not, so they go into the instance's id.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvcm_ray.core.model import InstanceInfo, LocationSpecGroup, LocationSpecInfo, ModelDeployment

SAMPLES, SAMPLE_BYTES = 64, 4096
_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")


def digest(*parts: object) -> str:
    """12 hexadecimal digits."""
    hashed = hashlib.blake2b(digest_size=6)
    for part in parts:
        text = str(part).encode()
        hashed.update(len(text).to_bytes(8, "little") + text)
    return hashed.hexdigest()


def model_name(model: str) -> str:
    """The model's name, without the place it lies at."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def weights_version(model: str, revision: str | None, load_format: str, seed: int) -> str:
    """Names the weights. Files are sampled evenly: cheap, and the same on every machine."""
    if load_format == "dummy":
        return f"dummy-{seed}"
    folder = Path(model)
    if not folder.is_dir():
        return digest(model, revision or "")
    hashed = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.iterdir()):
        if path.suffix in _WEIGHTS:
            hashed.update(f"{path.name}:{path.stat().st_size}".encode())
            _sample(path, hashed)
    return hashed.hexdigest()


def _sample(path: Path, hashed: Any) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        for number in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * number // (SAMPLES - 1))
            hashed.update(file.read(SAMPLE_BYTES))


def hash_scheme(algorithm: str) -> str | None:
    """Names the engine's block hashes; None if they differ between processes."""
    seed = os.environ.get("PYTHONHASHSEED", "")
    if algorithm.startswith("xxhash") and not seed.isdigit():
        return None
    return f"{algorithm}-{seed}"


def instance_info(
    *,
    group: str,
    instance_id: str,
    block_tokens: int,
    specs: Mapping[str, int],
    deployment: ModelDeployment,
    version: str,
    depends_on: tuple[object, ...],
    spec_groups: Mapping[str, Sequence[str]] | None = None,
) -> InstanceInfo:
    """The instance to register; with no id given, one that names the model and all that blocks depend on."""
    groups = tuple(LocationSpecGroup(n, tuple(names)) for n, names in (spec_groups or {}).items())
    ordered = tuple(LocationSpecInfo(name, size) for name, size in sorted(specs.items()))
    if not instance_id:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", deployment.model_name).strip("-.")[-60:] or "model"
        instance_id = f"{name}-{digest(version, block_tokens, ordered, groups, deployment, *depends_on)}"
    return InstanceInfo(
        instance_group_name=group, instance_id=instance_id, block_size=block_tokens,
        location_spec_infos=ordered, model_deployment=deployment, model_version=version,
        location_spec_groups=groups,
    )  # fmt: skip
