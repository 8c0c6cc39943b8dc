"""Options that turn hits into money: the model that is served, GPUs, the tier that holds the blocks.

What is not given is assumed, and results say so: an H100, 40 % of its peak, host memory, the prices of the
catalogue, and as many GPUs for a replica as its weights need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvcm_ray.cli.values import FRACTION, RATE

if TYPE_CHECKING:
    from kvcm_ray.optimizer.catalogue import Catalogue, Gpu, Model, TierCosts
    from kvcm_ray.optimizer.economics import Costs

GPU, TIER, UTILISATION, VALUE_BYTES = "h100", "dram", 0.4, 2.0
_WEIGHTS_SHARE = 0.8  #: of the memory of a replica, at most; the rest is for the blocks of running requests
_REPLICA_MAX = 1024

_USD = click.FloatRange(min=0)
_OPTIONS: Sequence[Callable[..., Any]] = (
    click.option("--model", help="What is served, e.g. llama-3-70b. Makes hits GPU-hours, time and money."),
    click.option("--gpu", help=f"What it runs on. [default: {GPU}]"),
    click.option("--gpu-price", type=_USD, metavar="USD", help="Of a GPU-hour. [default: the catalogue's]"),
    click.option("--gpus", type=click.IntRange(min=1), help="Of one replica. [default: as the weights need]"),
    click.option(
        "--utilisation", type=FRACTION,
        help=f"Share of the peak FLOP/s that prefill reaches. [default: {UTILISATION:.0%}, assumed]",
    ),
    click.option(
        "--kv-value-bytes", type=click.FloatRange(min=0, min_open=True),
        help=f"Of one number of keys and values. [default: {VALUE_BYTES:g}, bf16; fp8 has 1]",
    ),
    click.option("--tier", help=f"Where blocks lie: dram, remote-dram, nvme, ... [default: {TIER}]"),
    click.option("--tier-price", type=_USD, metavar="USD", help="Of a GiB for a month there."),
    click.option("--tier-read", type=RATE, help="Bytes a second that a request reads there, e.g. 20GB/s."),
    click.option(
        "--catalogue", "catalogues", type=click.Path(exists=True, dir_okay=False, path_type=Path),
        multiple=True, help="TOML file with models, gpus and tiers of yours; may be repeated.",
    ),
    click.option("--budget", type=_USD, metavar="USD", help="Most that the cache may cost an hour."),
)  # fmt: skip
_NEED_MODEL = (
    "gpu", "gpu_price", "gpus", "utilisation", "kv_value_bytes", "tier", "tier_price", "tier_read", "budget",
)  # fmt: skip


def money_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--model`` and what goes with it; see `money_of`."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def money_of(options: dict[str, Any]) -> tuple[Model, Costs] | tuple[None, None]:
    """The model and its costs, or neither without ``--model``.

    Raises:
        UsageError: an option is given that means nothing without ``--model``.
        NotFound, InvalidArgument: as `read_catalogue`, and its look-ups.
    """
    if options["model"] is None:
        for name in _NEED_MODEL:
            if options[name] is not None:
                raise click.UsageError(
                    f"--{name.replace('_', '-')} needs --model: it says what hits are worth"
                )
        return None, None
    from kvcm_ray.optimizer.catalogue import read_catalogue
    from kvcm_ray.optimizer.economics import Costs

    catalogue = read_catalogue(*options["catalogues"])
    model, gpu = catalogue.model(options["model"]), catalogue.gpu(options["gpu"] or GPU)
    costs = Costs(
        gpu=gpu,
        utilisation=UTILISATION if options["utilisation"] is None else options["utilisation"],
        price_per_hour=options["gpu_price"],
        gpus_per_replica=options["gpus"] or gpus_for(model, gpu),
        tiers=(_tier(catalogue, options),),
        kv_value_bytes=options["kv_value_bytes"] or VALUE_BYTES,
    )
    return model, costs


def gpus_for(model: Model, gpu: Gpu) -> int:
    """The smallest power of two whose memory holds the weights in bf16, and leaves some for blocks."""
    weights = 2 * (model.parameters_total or model.parameters)
    count = 1
    while count < _REPLICA_MAX and weights > _WEIGHTS_SHARE * count * gpu.memory_bytes:
        count *= 2
    return count


def _tier(catalogue: Catalogue, options: dict[str, Any]) -> TierCosts:
    given = {"usd_per_gib_month": options["tier_price"], "read_bytes_per_s": options["tier_read"]}
    tier = catalogue.tier(options["tier"] or TIER)
    return replace(tier, **{name: value for name, value in given.items() if value is not None})
