"""``kvcm why``: what an error code means and what to do about it."""

from __future__ import annotations

import difflib
from typing import Any

import click

from kvcm_ray.cli.output import emit, json_option, table
from kvcm_ray.errors import InvalidArgument, KvcmError
from kvcm_ray.explanations import EXPLANATIONS, all_errors, by_code, lines, title


@click.command()
@click.argument("code", required=False)
@json_option
def why(code: str | None, as_json: bool) -> None:
    """Explain an error code: what it means, usual causes, what to do.

    CODE is written KVCM-Q001, q001 or QuotaExceeded. Without it, list all codes.

    \b
    Examples:
      kvcm why KVCM-Q001
      kvcm why
    """
    if code is None:
        rows = [(k.code, k.__name__, "yes" if k.retryable else "no", title(k)) for k in all_errors()]
        codes = [_plain(kind) for kind in all_errors()]
        emit({"codes": codes}, as_json, table(("code", "name", "retry", "what happened"), rows))
        return
    kind = by_code(code)
    if kind is None:
        hint = "`kvcm why` lists all codes."
        raise InvalidArgument(f"there is no code {code!r}{_nearest(code)}", hint=hint)
    emit(_plain(kind), as_json, lines(kind))


def _nearest(code: str) -> str:
    names = {k.code: k.code for k in all_errors()} | {k.__name__: k.code for k in all_errors()}
    wanted = code.upper() if code.upper().startswith("KVCM") or code[1:].isdigit() else code
    if wanted[1:].isdigit():
        wanted = f"KVCM-{wanted}"
    near = difflib.get_close_matches(wanted, names, 1, 0.5)
    return f"; did you mean {names[near[0]]}?" if near else ""


def _plain(kind: type[KvcmError]) -> dict[str, Any]:
    found = EXPLANATIONS[kind]
    return {
        "code": kind.code, "error": kind.__name__, "meaning": title(kind), "causes": list(found.causes),
        "steps": list(found.steps), "unchanged": found.unchanged, "wire": kind.wire,
        "retryable": kind.retryable, "hint": kind.hint,
    }  # fmt: skip
