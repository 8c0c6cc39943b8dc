"""Block keys for engines: one scheme, the same in every process, on every machine, in every version.

A *block hash* names a block and all that comes before it; it is at least 8 bytes, mostly 32. Engines
bring theirs (vLLM as bytes, SGLang as hex digits), and `hashes_of_tokens` makes them for those that have
none. The cache's key of a block is a signed 64-bit number:

    key = first 8 bytes of the block hash, as a little-endian number, XOR salt

`salt_of` names what makes blocks of equal tokens differ without being in the hash: the model's variant, a
LoRA adapter, a tenant. Salt 0 is "nothing". What varies within a prompt (an image at some position) belongs
into the hash of the blocks from there on: engines do that, and `hashes_of_tokens` takes ``inputs``.

Token ids alone need none of this: the wire's own scheme (`kvcm_ray.core.hashing`) hashes them, and whoever
shares blocks with clients that send ``token_ids`` has to use that one. Both are deterministic for ever; the
vectors in the tests may not change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from kvcm_ray.core.limits import TOKENS_PER_CALL_MAX
from kvcm_ray.errors import InvalidArgument

Keys = npt.NDArray[np.int64]
Tokens = Sequence[int] | npt.NDArray[np.integer]

KEY_BYTES = 8
_LE = np.dtype("<u8")


def salt_of(**parts: str | int | bytes | None) -> int:
    """An unsigned 64-bit salt from named parts, e.g. ``salt_of(lora="sql-v2", tenant="acme")``.

    The order of the parts does not matter; parts that are None or empty count as not given, and no part at
    all is salt 0.

    Raises:
        InvalidArgument: a part that is neither text, nor bytes, nor an integer.
    """
    given = {name: _plain(name, value) for name, value in parts.items() if value not in (None, "", b"")}
    if not given:
        return 0
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for name in sorted(given):
        for text in (name.encode(), given[name]):
            digest.update(len(text).to_bytes(8, "little"))
            digest.update(text)
    return int.from_bytes(digest.digest(), "little")


def _plain(name: str, value: object) -> bytes:
    """A part as bytes; its first byte tells text, bytes and numbers apart."""
    if isinstance(value, str):
        return b"s" + value.encode()
    if isinstance(value, bytes):
        return b"b" + value
    if isinstance(value, int):
        return b"i" + str(int(value)).encode()
    raise InvalidArgument(f"salt part {name!r} is a {type(value).__name__}; give text, bytes or an integer")


def keys_of_hashes(hashes: Sequence[bytes], salt: int = 0) -> Keys:
    """Keys of block hashes given as bytes, 8 or more each (all of one length, or not).

    Raises:
        InvalidArgument: a hash that is shorter.
    """
    if not len(hashes):
        return np.zeros(0, np.int64)
    try:
        heads = b"".join([value[:KEY_BYTES] for value in hashes])
    except TypeError as error:
        raise InvalidArgument(f"block hashes must be bytes: {error}") from error
    if len(heads) != KEY_BYTES * len(hashes) or min(map(len, hashes)) < KEY_BYTES:
        raise InvalidArgument(f"a block hash must have {KEY_BYTES} bytes or more")
    return _salted(np.frombuffer(heads, _LE), salt)


def keys_of_hex(hashes: Sequence[str], salt: int = 0) -> Keys:
    """Keys of block hashes given as hexadecimal digits, 16 or more each: those of the same bytes.

    Raises:
        InvalidArgument: a hash that is shorter, or begins with something else.
    """
    digits = 2 * KEY_BYTES
    try:
        heads = bytes.fromhex("".join([value[:digits] for value in hashes]))
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"block hashes must be hexadecimal digits: {error}") from error
    if len(heads) != KEY_BYTES * len(hashes) or any(len(value) < digits for value in hashes):
        raise InvalidArgument(f"a block hash must have {digits} hexadecimal digits or more")
    return _salted(np.frombuffer(heads, _LE), salt)


def hashes_of_tokens(
    tokens: Tokens, block_size: int, *, seed: bytes = b"", inputs: Mapping[int, bytes] | None = None
) -> list[bytes]:
    """Block hashes of a prompt's ``len(tokens) // block_size`` full blocks, 32 bytes each.

    ``hash[i] = SHA-256(hash[i - 1] + block i's tokens, 4 bytes each, little-endian + its inputs)``, with
    `seed` in place of a hash before the first. Without inputs this is how SGLang hashes its pages.

    Args:
        tokens: ids within 0 .. 2**32 - 1.
        inputs: what else the model was given, by token position, each named by a hash of its content: an
            image at its first placeholder token, for example. It counts for its block and all that follow.

    Raises:
        InvalidArgument: block_size <= 0, too many tokens, an id or a position out of range.
    """
    if block_size <= 0:
        raise InvalidArgument(f"block_size {block_size} must be positive")
    if len(tokens) > TOKENS_PER_CALL_MAX:
        raise InvalidArgument(f"{len(tokens)} tokens, more than {TOKENS_PER_CALL_MAX} a call")
    data = memoryview(_token_bytes(tokens))
    by_block = _by_block(inputs or {}, len(tokens), block_size)
    found, parent, step = [], seed, 4 * block_size
    for block in range(len(tokens) // block_size):
        digest = hashlib.sha256(parent)
        digest.update(data[block * step : (block + 1) * step])
        if block in by_block:
            digest.update(by_block[block])
        parent = digest.digest()
        found.append(parent)
    return found


def keys_of_tokens(
    tokens: Tokens, block_size: int, salt: int = 0, *, inputs: Mapping[int, bytes] | None = None
) -> Keys:
    """Keys of a prompt's full blocks: those of `hashes_of_tokens`. Raises InvalidArgument."""
    return keys_of_hashes(hashes_of_tokens(tokens, block_size, inputs=inputs), salt)


def _token_bytes(tokens: Tokens) -> bytes:
    try:
        array = np.asarray(tokens)
        if len(array) and (array.ndim != 1 or array.dtype.kind not in "iu"):
            raise TypeError(f"got {array.dtype} of {array.ndim} dimensions")
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidArgument(f"tokens must be a flat list of integers: {error}") from error
    if len(array) and (array.min() < 0 or array.max() >= 2**32):
        raise InvalidArgument(f"token ids must be within 0 and 2**32 - 1, got {array.min()}..{array.max()}")
    return array.astype("<u4").tobytes()


def _by_block(inputs: Mapping[int, bytes], tokens: int, block_size: int) -> dict[int, bytes]:
    """The inputs that begin in each block, with their positions, as bytes to be hashed."""
    found: dict[int, bytes] = {}
    for position in sorted(inputs):
        if not 0 <= position < tokens:
            raise InvalidArgument(f"an input at token {position} of {tokens}")
        text = b"%d:%d:" % (position % block_size, len(inputs[position])) + inputs[position]
        found[position // block_size] = found.get(position // block_size, b"") + text
    return found


def _salted(numbers: npt.NDArray[np.uint64], salt: int) -> Keys:
    if not 0 <= salt < 2**64:
        raise InvalidArgument(f"a salt is an unsigned 64-bit number, got {salt}")
    return np.ascontiguousarray(numbers ^ np.uint64(salt), np.uint64).view(np.int64)
