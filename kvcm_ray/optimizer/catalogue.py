"""What is known of models, GPUs and tiers by name.

The entries are data: ``data/models.toml``, ``gpus.toml`` and ``tiers.toml``, whose heads say what each
field means and where it comes from. Shapes and peaks are published facts. **Prices, and all of tiers,
are assumptions**: replace them by your own, with arguments or with a file of ``[models.NAME]``,
``[gpus.NAME]`` and ``[tiers.NAME]`` tables that have the same fields:

    [gpus.h100]
    usd_per_hour = 2.2        # the rest stays as it is

    [models.ours]
    parameters = 13           # billions
    layers = 40
    ...
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from kvcm_ray.errors import InvalidArgument, NotFound

T = TypeVar("T")
_Tables = dict[str, dict[str, Any]]  #: fields of each entry by its name


def _positive(what: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise InvalidArgument(f"{what}: {name} must be above 0, got {value}")


def _at_least_0(what: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise InvalidArgument(f"{what}: {name} must not be negative, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A decoder-only transformer with full attention in all layers.

    Raises:
        InvalidArgument: a number is not above 0, or negative where 0 means "not given".
    """

    name: str
    parameters: float  #: that one token uses
    layers: int
    heads: int  #: of queries
    kv_heads: int
    head_size: int  #: numbers of a query and a key in one head
    value_head_size: int = 0  #: numbers of a value in one head; 0: as many
    kv_latent: int = 0  #: numbers that a layer keeps of a token instead of keys and values (MLA); 0: none
    parameters_total: float = 0  #: of all experts; 0: the same
    hidden_size: int = 0  #: 0: not given; only shown

    def __post_init__(self) -> None:
        _positive(
            f"model {self.name!r}", parameters=self.parameters, layers=self.layers, heads=self.heads,
            kv_heads=self.kv_heads, head_size=self.head_size,
        )  # fmt: skip
        _at_least_0(
            f"model {self.name!r}", value_head_size=self.value_head_size, kv_latent=self.kv_latent,
            parameters_total=self.parameters_total, hidden_size=self.hidden_size,
        )  # fmt: skip

    @property
    def attention_width(self) -> float:
        """D of the formulas in `savings`: heads x head size, or its mean over keys and values."""
        return self.heads * (self.head_size + (self.value_head_size or self.head_size)) / 2

    def kv_bytes_per_token(self, value_bytes: float = 2) -> float:
        """What all layers keep of a token; `value_bytes` is 2 for bf16 and fp16, 1 for fp8."""
        values = self.kv_heads * (self.head_size + (self.value_head_size or self.head_size))
        return self.layers * (self.kv_latent or values) * value_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """Raises InvalidArgument if a number is not above 0, or the price is negative."""

    name: str
    peak_flops: float  #: FLOP/s, dense bf16 on tensor cores (data sheets often give twice that: sparse)
    memory_bytes: float
    memory_bytes_per_s: float
    usd_per_hour: float = 0  #: an assumption of the catalogue, in US dollars; 0: none is assumed

    def __post_init__(self) -> None:
        _positive(
            f"GPU {self.name!r}", peak_flops=self.peak_flops, memory_bytes=self.memory_bytes,
            memory_bytes_per_s=self.memory_bytes_per_s,
        )  # fmt: skip
        _at_least_0(f"GPU {self.name!r}", usd_per_hour=self.usd_per_hour)


@dataclass(frozen=True, slots=True, kw_only=True)
class TierCosts:
    """Raises InvalidArgument if the bandwidth is not above 0, or another number is negative."""

    name: str
    read_bytes_per_s: float  #: of one request, into the GPU, all its ranks together
    latency_s: float = 0  #: once for each request that reads there
    usd_per_gib_month: float = 0  #: of capacity, used or not

    def __post_init__(self) -> None:
        what = f"tier {self.name!r}"
        _positive(what, read_bytes_per_s=self.read_bytes_per_s)
        _at_least_0(what, latency_s=self.latency_s, usd_per_gib_month=self.usd_per_gib_month)


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Entries by name; look them up with `model`, `gpu` and `tier`, which also know other names."""

    models: Mapping[str, Model]
    gpus: Mapping[str, Gpu]
    tiers: Mapping[str, TierCosts]
    aliases: Mapping[str, Mapping[str, str]]  #: "models", "gpus", "tiers" -> other name -> name

    def model(self, name: str) -> Model:
        """``llama-3-70b``, or as it is published: ``meta-llama/Llama-3.1-70B-Instruct``.

        Raises:
            NotFound: there is none of that name; the message lists those that are near.
        """
        return _named("model", name, self.models, self.aliases["models"])

    def gpu(self, name: str) -> Gpu:
        """Raises NotFound as `model`."""
        return _named("GPU", name, self.gpus, self.aliases["gpus"])

    def tier(self, name: str) -> TierCosts:
        """Raises NotFound as `model`."""
        return _named("tier", name, self.tiers, self.aliases["tiers"])


def _named(kind: str, name: str, entries: Mapping[str, T], aliases: Mapping[str, str]) -> T:
    plain = _plain(name)
    plain = aliases.get(plain, plain)
    if plain in entries:
        return entries[plain]
    near = difflib.get_close_matches(plain, [*entries, *aliases], 4, 0.5)
    meant = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(entries)}"
    raise NotFound(
        f"the catalogue has no {kind} {name!r}; {meant}",
        hint="Take one of those, or describe yours in a file and give it with --catalogue.",
    )


def _plain(name: str) -> str:
    """A name without what does not change the shape: who publishes it, and what it was tuned for."""
    plain = name.strip().lower().replace("_", "-").rsplit("/", 1)[-1].removeprefix("meta-")
    for suffix in ("-instruct", "-chat", "-base", "-hf"):
        plain = plain.removesuffix(suffix)
    return plain


def read_catalogue(*files: str | Path) -> Catalogue:
    """The catalogue that comes with the package, with what these files add to it or change in it.

    A later file wins. A table of a name that is there already changes the fields that it gives.

    Raises:
        InvalidArgument: a file cannot be read or is not TOML, or a field is unknown, missing or bad; the
            message says which.
    """
    tables = {kind: {name: dict(entry) for name, entry in _bundled(kind).items()} for kind in _KINDS}
    for file in files:
        for kind, entries in _read(Path(file)).items():
            for name, entry in entries.items():
                plain = _plain(name)
                plain = _aliases(kind, tables[kind]).get(plain, plain)
                tables[kind].setdefault(plain, {}).update(entry)
    return Catalogue(
        _entries(tables, "models", _model),
        _entries(tables, "gpus", _gpu),
        _entries(tables, "tiers", _tier),
        {kind: _aliases(kind, entries) for kind, entries in tables.items()},
    )


@cache
def _bundled(kind: str) -> _Tables:
    found = resources.files("kvcm_ray.optimizer").joinpath("data", f"{kind}.toml")
    return tomllib.loads(found.read_text(encoding="utf-8"))


def _read(file: Path) -> dict[str, _Tables]:
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"cannot read the catalogue {file}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgument(f"{file} is not TOML: {error}") from error
    for kind, entries in found.items():
        if kind not in _KINDS:
            raise InvalidArgument(f"{file}: a catalogue has {', '.join(_KINDS)}, not {kind!r}")
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            raise InvalidArgument(f"{file}: {kind} holds tables; begin each with [{kind}.NAME]")
    return found


def _entries(tables: dict[str, _Tables], kind: str, make: Callable[[str, Any], T]) -> dict[str, T]:
    return {name: make(name, _checked(kind, name, entry)) for name, entry in tables[kind].items()}


def _checked(kind: str, name: str, entry: dict[str, Any]) -> dict[str, float]:
    """The numbers of an entry; those that it does not need to have are 0."""
    required, optional = _KINDS[kind]
    for field, value in entry.items():
        if field == "aliases":
            continue
        if isinstance(value, dict):
            raise InvalidArgument(
                f"{kind}.{name}.{field} is a table in a table; quote a name with a dot: "
                f'[{kind}."{name}.{field}"]'
            )
        if field not in (*required, *optional):
            near = difflib.get_close_matches(field, (*required, *optional), 1)
            meant = f"did you mean {near[0]!r}?" if near else f"there are {', '.join((*required, *optional))}"
            raise InvalidArgument(f"{kind}.{name}: no such field {field!r}; {meant}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidArgument(f"{kind}.{name}: {field} must be a number, not {value!r}")
        if field in _WHOLE and value != int(value):
            raise InvalidArgument(f"{kind}.{name}: {field} must be a whole number, not {value!r}")
    for field in required:
        if field not in entry:
            raise InvalidArgument(f"{kind}.{name}: {field} is missing")
    return {field: entry.get(field, 0) for field in (*required, *optional)}


def _aliases(kind: str, entries: _Tables) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, entry in entries.items():
        others = entry.get("aliases", [])
        if not isinstance(others, list) or not all(isinstance(other, str) for other in others):
            raise InvalidArgument(f"{kind}.{name}: aliases must be a list of names, not {others!r}")
        found |= {_plain(other): name for other in others if _plain(other) not in entries}
    return found


#: Fields that an entry must have, and those that it may have.
_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "models": (
        ("parameters", "layers", "heads", "kv_heads", "head_size"),
        ("parameters_total", "hidden_size", "value_head_size", "kv_latent"),
    ),
    "gpus": (("teraflops", "memory_gb", "memory_gb_per_s"), ("usd_per_hour",)),
    "tiers": (("read_gb_per_s",), ("latency_s", "usd_per_gib_month")),
}

_WHOLE = ("layers", "heads", "kv_heads", "head_size", "hidden_size", "value_head_size", "kv_latent")


def _model(name: str, entry: dict[str, Any]) -> Model:
    billions = {field: entry[field] * 1e9 for field in ("parameters", "parameters_total")}
    return Model(name=name, **billions, **{field: int(entry[field]) for field in _WHOLE})


def _gpu(name: str, entry: dict[str, Any]) -> Gpu:
    return Gpu(
        name=name, peak_flops=entry["teraflops"] * 1e12, memory_bytes=entry["memory_gb"] * 1e9,
        memory_bytes_per_s=entry["memory_gb_per_s"] * 1e9, usd_per_hour=entry["usd_per_hour"],
    )  # fmt: skip


def _tier(name: str, entry: dict[str, Any]) -> TierCosts:
    return TierCosts(
        name=name, read_bytes_per_s=entry["read_gb_per_s"] * 1e9, latency_s=entry["latency_s"],
        usd_per_gib_month=entry["usd_per_gib_month"],
    )  # fmt: skip
