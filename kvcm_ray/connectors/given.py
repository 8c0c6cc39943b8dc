"""Checking what a user wrote into an engine's free-form configuration against a dataclass of settings."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from kvcm_ray.errors import InvalidArgument


def checked(settings: type[Any], given: Mapping[str, Any], refusal: str) -> dict[str, Any]:
    """The given values, each of the type of that setting's default.

    Args:
        refusal: begins the message about names that there are not.

    Raises:
        InvalidArgument: an unknown name, or a value of the wrong type.
    """
    fields = {field.name: field.default for field in dataclasses.fields(settings)}
    if unknown := sorted(set(given) - set(fields)):
        raise InvalidArgument(f"{refusal} {', '.join(unknown)}; it knows {', '.join(fields)}")
    return {name: _typed(name, value, fields[name]) for name, value in given.items()}


def with_address(values: dict[str, Any]) -> dict[str, Any]:
    """The same, with KVCM_ADDRESS (a data directory) or KVCM_URL if they name no manager."""
    if not values.get("kvcm_data_dir") and not values.get("kvcm_url"):
        values["kvcm_data_dir"] = os.environ.get("KVCM_ADDRESS", "")
        values["kvcm_url"] = "" if values["kvcm_data_dir"] else os.environ.get("KVCM_URL", "")
    return values


def _typed(name: str, value: Any, default: Any) -> Any:
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise InvalidArgument(f"{name} must be a {type(default).__name__}, got {value!r}")
    return value
