"""Save and restore the KV cache of a Hugging Face model by blocks: for scripts, notebooks and teaching.

    from kvcm_ray.client import connect
    from kvcm_ray.connectors.transformers import ModelCache

    cache = ModelCache(connect("http://127.0.0.1:6382"), model, "smollm2")
    found = cache.prefill(input_ids)        # computes only what the cache does not have, and stores that
    print(found.from_cache, "of", input_ids.shape[1], "tokens came from the cache")
    model.generate(..., past_key_values=found.past)

A block holds ``block_size`` tokens of every layer, ``[layer][K, V][head][token][head_dim]``, in one spec
named ``kv``. What is restored is bit for bit what was saved, unless ``wire_dtype`` asks for fewer bits. Keys
depend on the tokens, on `salt` and on a sample of the weights, so models do not get each other's blocks.

One prompt at a time (batch size 1) and full attention in all layers; a layer that forgets (a sliding window)
cannot be cut into blocks afterwards and is refused. Needs torch and transformers; never raises for trouble of
the cache, which is a miss.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from kvcm_ray.client import Client
from kvcm_ray.connectors.keys import Keys, keys_of_tokens, salt_of
from kvcm_ray.core.model import ModelDeployment
from kvcm_ray.errors import InvalidArgument, KvcmError, Unsupported

log = logging.getLogger(__name__)

Index = npt.NDArray[np.intp]

SPEC = "kv"
SAMPLE = 64  #: values of each parameter that the fingerprint looks at


@dataclass(frozen=True, slots=True)
class Restored:
    """The leading tokens of a prompt as a model's cache."""

    past: DynamicCache
    tokens: int  #: how many; 0 = nothing was found


@dataclass(frozen=True, slots=True)
class Prefilled:
    """What `ModelCache.prefill` did."""

    logits: torch.Tensor  #: of the prompt's last token, shape (vocabulary,)
    past: DynamicCache  #: of the whole prompt
    from_cache: int  #: tokens that were not computed
    stored: int  #: blocks that were new to the cache


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model's cache: per layer and token, K and V are (heads, head_dim) each."""

    layers: int
    heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        config = config.get_text_config()
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, head_dim)

    def blocks(self, count: int, block_size: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory of so many blocks."""
        return torch.empty((count, self.layers, 2, self.heads, block_size, self.head_dim), dtype=dtype)


class ModelCache:
    """The cache of one model under one instance id."""

    def __init__(
        self,
        client: Client,
        model: Any,
        instance_id: str,
        group: str = "default",
        *,
        block_size: int = 16,
        wire_dtype: torch.dtype | None = None,
        salt: int = 0,
    ) -> None:
        """Registers the instance.

        Args:
            block_size: tokens a block.
            wire_dtype: what blocks are stored as; the model's own type if None. Fewer bits save room and are
                not exact.
            salt: of `keys.salt_of`, for what else makes equal tokens differ: a LoRA adapter, a tenant.

        Raises:
            InstanceMismatch: the id is registered with another model, block size or type. InvalidArgument,
            GroupNotFound, Unavailable.
        """
        if block_size <= 0:
            raise InvalidArgument(f"block_size {block_size} must be positive")
        self.model = model
        self.shape = Shape.of(model.config)
        self.block_size = block_size
        self.wire_dtype = wire_dtype or model.dtype
        self._salt = salt ^ salt_of(weights=fingerprint(model))
        size = self.shape.blocks(1, block_size, self.wire_dtype).nbytes
        name = model.config.name_or_path or type(model).__name__
        dtype = str(self.wire_dtype).removeprefix("torch.")
        deployment = ModelDeployment(model_name=name, dtype=dtype, tp_size=1, dp_size=1, pp_size=1)
        self._instance = client.register(
            instance_id, group, block_size=block_size, specs={SPEC: size}, deployment=deployment
        )

    def keys(self, token_ids: Sequence[int] | torch.Tensor) -> Keys:
        """Block keys of a prompt's full blocks."""
        return keys_of_tokens(_flat(token_ids), self.block_size, self._salt)

    def match_length(self, token_ids: Sequence[int] | torch.Tensor) -> int:
        """How many leading tokens the cache holds."""
        return self._instance.match_length(self.keys(token_ids)) * self.block_size

    def load(self, token_ids: Sequence[int] | torch.Tensor, *, deadline_s: float | None = 2.0) -> Restored:
        """The longest cached prefix of a prompt, but at least one token less than the prompt.

        (A model must be given a token to say what comes next.) Blocks that cannot be read within
        `deadline_s` count as not there.
        """
        flat = _flat(token_ids)
        keys = self.keys(flat)[: max(0, len(flat) - 1) // self.block_size]
        found = self._instance.match(keys)
        past, read = DynamicCache(), 0
        if found.length:
            blocks = self.shape.blocks(found.length, self.block_size, self.wire_dtype)
            read = int(self._instance.read(found.blocks, blocks, deadline_s=deadline_s))
        if read:
            _into_cache(blocks[:read].to(self.model.device, self.model.dtype), past)
        return Restored(past, read * self.block_size)

    def save(self, token_ids: Sequence[int] | torch.Tensor, past: DynamicCache) -> int:
        """Store the full blocks of a prompt from the model's cache; returns how many were new.

        Args:
            past: what the model returned; it may hold more tokens than the prompt has.

        Raises:
            Unsupported: a layer without keys and values of all tokens. InvalidArgument: fewer tokens in
            `past` than in the prompt, a batch, or another shape than the model's.
        """
        flat = _flat(token_ids)
        layers = self._layers(past, len(flat))
        try:
            session = self._instance.start_write(self.keys(flat))
            if not len(session.todo):
                return 0
            blocks = self.shape.blocks(len(session.todo), self.block_size, self.wire_dtype)
            _from_layers(layers, blocks, session.todo)
            session.write(blocks, SPEC)
            return session.finish().committed
        except InvalidArgument:
            raise
        except KvcmError as error:
            log.warning("nothing stored: %s", error)
            return 0

    def prefill(self, token_ids: Sequence[int] | torch.Tensor) -> Prefilled:
        """Run the model over a prompt, from the cache as far as it goes, and store what is new."""
        flat = _flat(token_ids)
        found = self.load(flat)
        rest = torch.tensor([flat[found.tokens :]], device=self.model.device)
        with torch.inference_mode():
            out = self.model(rest, past_key_values=found.past, use_cache=True, logits_to_keep=1)
        stored = self.save(flat, out.past_key_values)
        return Prefilled(out.logits[0, -1], out.past_key_values, found.tokens, stored)

    def _layers(self, past: DynamicCache, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each layer, (heads, tokens, head_dim)."""
        found = []
        for number, layer in enumerate(past.layers):
            if type(layer) is not DynamicLayer or not layer.is_initialized:
                raise Unsupported(
                    f"layer {number} is a {type(layer).__name__}; only full attention can be saved"
                )
            batch, heads, length, head_dim = layer.keys.shape
            if (batch, heads, head_dim) != (1, self.shape.heads, self.shape.head_dim) or length < tokens:
                text = f"layer {number} has keys of shape {tuple(layer.keys.shape)} for {tokens} tokens"
                raise InvalidArgument(f"{text} of {self.shape}, one prompt at a time")
            found.append((layer.keys[0], layer.values[0]))
        if len(found) != self.shape.layers:
            raise InvalidArgument(f"the cache has {len(found)} layers, the model {self.shape.layers}")
        return found


def fingerprint(model: Any) -> bytes:
    """Names, shapes, types and a sample of the values of a model's parameters, hashed. 16 bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE]
        digest.update(sample.to("cpu", torch.float64).numpy().tobytes())
    return digest.digest()


def _flat(token_ids: Sequence[int] | torch.Tensor) -> list[int]:
    if not isinstance(token_ids, torch.Tensor):
        return list(token_ids)
    if token_ids.ndim == 2 and token_ids.shape[0] == 1:
        token_ids = token_ids[0]
    if token_ids.ndim != 1:
        raise InvalidArgument(f"token ids of shape {tuple(token_ids.shape)}: one prompt at a time")
    found: list[int] = token_ids.tolist()
    return found


def _from_layers(
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]], blocks: torch.Tensor, wanted: Index
) -> None:
    """Fill `blocks` with those blocks of the prompt that `wanted` numbers (ascending)."""
    block_size, end = blocks.shape[4], int(wanted[-1]) + 1
    together = end - int(wanted[0]) == len(wanted)
    index = slice(int(wanted[0]), end) if together else torch.from_numpy(wanted)
    for number, pair in enumerate(layers):
        for part, tensor in enumerate(pair):
            by_block = tensor[:, : end * block_size].unflatten(1, (end, block_size)).transpose(0, 1)
            blocks[:, number, part].copy_(by_block[index])


def _into_cache(blocks: torch.Tensor, past: DynamicCache) -> None:
    """Append blocks to an empty cache."""
    for number in range(blocks.shape[1]):
        key, value = (blocks[:, number, part].transpose(0, 1).flatten(1, 2)[None] for part in (0, 1))
        past.update(key.contiguous(), value.contiguous(), number)
