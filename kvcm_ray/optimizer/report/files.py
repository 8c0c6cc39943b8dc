"""The files of an analysis: what scripts read, and what people look at.

    result.json      what ``kvcm optimize --json`` prints
    curve.csv        policies and capacities, as the table
    requests.csv     each request: when, how long, how many blocks were hits at the knee
    turns.csv, classes.csv, instances.csv      hits at the knee, as far as the trace tells them apart
    NAME.svg, NAME.dark.svg     each chart
    report.html      all of it to look at

Files that are there already are replaced.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from kvcm_ray.errors import InvalidArgument, Unsupported
from kvcm_ray.optimizer.report.page import page
from kvcm_ray.optimizer.report.palette import dark

if TYPE_CHECKING:
    from kvcm_ray.optimizer.analysis import Analysis

PARTS = {"turn": "turns", "class": "classes", "instance": "instances"}


def prepare(folder: Path) -> None:
    """Make the folder, and see that charts can be drawn: better known before an hour of replays than after.

    Raises:
        InvalidArgument: it cannot be made or written to.
        Unsupported: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise Unsupported(
            "charts need matplotlib, which is not installed", hint="pip install 'kvcm-ray[optimizer]'"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InvalidArgument(f"cannot write the report to {folder}: {error}") from error


def write(analysis: Analysis, folder: Path) -> list[Path]:
    """Raises as `prepare`."""
    prepare(folder)
    try:
        return [*_data(analysis, folder), *_pictures(analysis, folder)]
    except OSError as error:
        raise InvalidArgument(f"cannot write the report to {folder}: {error}") from error


def _data(analysis: Analysis, folder: Path) -> list[Path]:
    found = analysis.to_dict()
    result = folder / "result.json"
    result.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    written = [result, _table(folder / "curve.csv", _curve(found))]
    for by, name in PARTS.items():
        if rows := found.get(f"by_{by}"):
            written.append(_table(folder / f"{name}.csv", rows))
    if analysis.accesses is not None:
        written.append(_requests(analysis, folder / "requests.csv"))
    return written


def _curve(found: dict[str, Any]) -> list[dict[str, Any]]:
    optimum = {row["capacity_blocks"]: row["hit_blocks"] for row in found["optimum"]}
    return [row | {"optimum_hit_blocks": optimum.get(row["capacity_blocks"])} for row in found["rows"]]


def _table(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    return _csv(file, list(rows[0]), (row.values() for row in rows))


def _csv(file: Path, headings: Sequence[str], rows: Iterable[Iterable[Any]]) -> Path:
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(headings)
        writer.writerows(rows)
    return file


def _requests(analysis: Analysis, file: Path) -> Path:
    accesses, hits = analysis.at_knee
    columns = {
        "request": range(accesses.requests),
        "time_s": (accesses.times_s - accesses.times_s[:1]).round(6).tolist(),
        "op": [("", "read", "write", "request")[op] for op in accesses.ops.tolist()],
        "instance": [accesses.instance_names[number] for number in accesses.instances.tolist()],
        "class": [accesses.class_names[number] for number in accesses.classes.tolist()],
        "turn": accesses.turns.tolist(),
        "input_tokens": accesses.input_tokens.tolist(),
        "blocks": accesses.lengths.tolist(),
        "hit_blocks": hits.tolist(),
    }
    return _csv(file, list(columns), zip(*columns.values(), strict=True))


def _pictures(analysis: Analysis, folder: Path) -> list[Path]:
    drawings = {name: analysis.figure(name).svg() for name in analysis.figures}
    files = {folder / f"{name}.svg": drawing for name, drawing in drawings.items()}
    files |= {folder / f"{name}.dark.svg": dark(drawing) for name, drawing in drawings.items()}
    files[folder / "report.html"] = page(analysis, drawings)
    for file, text in files.items():
        file.write_text(text, encoding="utf-8")
    return list(files)
