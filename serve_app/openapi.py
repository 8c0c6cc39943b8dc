"""JSON schemas of the messages, from the same dataclasses as the codec."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, get_args, get_origin

from kvcm_ray.serve_app.endpoint import Endpoint
from kvcm_ray.serve_app.protojson import plan, strip_optional, width

_WIDTHS: dict[str, dict[str, Any]] = {
    "int32": {"type": "integer", "format": "int32"},
    "int64": {"type": ["string", "integer"], "format": "int64"},
    "double": {"type": "number", "format": "double"},
    "int64[]": {"type": "array", "items": {"type": ["integer", "string"], "format": "int64"}},
}


def operation(endpoint: Endpoint) -> dict[str, Any]:
    """What FastAPI cannot know of a route that reads its body itself."""
    request: dict[str, Any] = {"schema": schema(endpoint.request)}
    if endpoint.example is not None:
        request["example"] = endpoint.example
    answer = {"description": "See header.status.code", "content": _json(schema(endpoint.response))}
    return {
        "requestBody": {"required": True, "content": {"application/json": request}},
        "responses": {
            "200": answer,
            "400": {"description": "Not a JSON object of this message; the body is {}"},
            "413": {"description": "The body is too large"},
        },
    }


def _json(content: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": content}}


def schema(cls: type[Any]) -> dict[str, Any]:
    properties = {field.name: _field_schema(field.hint) for field in plan(cls).fields}
    result = {"type": "object", "title": cls.__name__, "properties": properties}
    first = (cls.__doc__ or "").strip().split("\n")[0]
    if first and not first.startswith(f"{cls.__name__}("):
        result["description"] = first
    return result


def _field_schema(hint: Any) -> dict[str, Any]:
    hint, _ = strip_optional(hint)
    if kind := width(hint):
        return dict(_WIDTHS[kind])
    if get_origin(hint) is tuple:
        return {"type": "array", "items": _field_schema(get_args(hint)[0])}
    if dataclasses.is_dataclass(hint):
        return schema(hint)  # type: ignore[arg-type]
    if get_origin(hint) is dict:
        return {"type": "object"}
    if hint is bool:
        return {"type": "boolean"}
    if isinstance(hint, type) and issubclass(hint, enum.IntEnum):
        return {"type": "string", "enum": [member.name for member in hint]}
    return {"type": "string"}
