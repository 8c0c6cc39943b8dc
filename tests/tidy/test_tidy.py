"""The house rules, enforced: import directions, sizes, no clock or chance in the core, one import name."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kvcm_ray", "actors", "serve_app", "storage_adapters", "benchmarks")
LINKS = ("actors", "serve_app", "storage_adapters", "benchmarks")
FUNCTION_LINES_MAX = 60
MODULE_LINES_MAX = 500

#: package -> top-level modules it must never import
FORBIDDEN = {
    "kvcm_ray/core": {
        "ray", "lmdb", "fastapi", "pydantic", "prometheus_client", "asyncio", "threading", "time",
        "random", "os", "logging", "msgpack", "secrets", "socket",
    },
    "kvcm_ray/index": {"ray", "fastapi", "pydantic"},
    "storage_adapters": {"ray", "lmdb", "fastapi", "pydantic"},
    "actors": {"fastapi"},
    "kvcm_ray/client": {"fastapi"},
    "serve_app": set(),
}  # fmt: skip

#: package -> packages of ours that it may import
ALLOWED = {
    "kvcm_ray/core": {"core", "errors"},
    "kvcm_ray/index": {"core", "errors", "index", "storage_adapters"},
    "storage_adapters": {"core", "errors", "storage_adapters"},
    "actors": {"core", "errors", "index", "storage_adapters", "traces", "actors", "logs"},
    "serve_app": {"core", "errors", "index", "storage_adapters", "actors", "serve_app", "version", "logs"},
    "kvcm_ray/client": {"core", "errors", "index", "storage_adapters", "actors", "client"},
}


def modules(folder: str = "") -> Iterator[Path]:
    """Every tracked-or-new Python module of ours, symlinks not followed twice."""
    for top in [folder] if folder else FOLDERS:
        for path in sorted((ROOT / top).rglob("*.py")):
            relative = path.relative_to(ROOT)
            if not (relative.parts[0] == "kvcm_ray" and relative.parts[1] in LINKS):
                yield path


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_import_directions(package: str) -> None:
    wrong = []
    for path in modules(package):
        for name, node in imports(ast.parse(path.read_text())):
            parts = name.split(".")
            ours = parts[0] == "kvcm_ray" and len(parts) > 1
            if parts[0] in FORBIDDEN[package] or (
                ours and package in ALLOWED and parts[1] not in ALLOWED[package]
            ):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_sizes() -> None:
    wrong = []
    for path in modules():
        text = path.read_text()
        if (count := text.count("\n")) > MODULE_LINES_MAX:
            wrong.append(f"{path.relative_to(ROOT)} has {count} lines, over {MODULE_LINES_MAX}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node, clean=False) or ""
                length = (node.end_lineno or 0) - node.lineno + 1 - docstring.count("\n")
                if length > FUNCTION_LINES_MAX:
                    where = f"{path.relative_to(ROOT)}:{node.lineno}"
                    wrong.append(f"{where} {node.name} has {length} lines")
    assert not wrong, "\n".join(wrong)


def test_public_modules_say_what_they_are_for() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in modules()
        if path.stat().st_size > 0 and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent, silent


def test_one_import_name() -> None:
    bare = re.compile(r"^\s*(?:from|import)\s+(actors|serve_app|storage_adapters|benchmarks)\b", re.M)
    wrong = [
        str(path.relative_to(ROOT))
        for path in [*modules(), *sorted((ROOT / "tests").rglob("*.py"))]
        if bare.search(path.read_text())
    ]
    assert not wrong, wrong


def test_links_lead_to_the_top_level_folders() -> None:
    for name in LINKS:
        link = ROOT / "kvcm_ray" / name
        assert link.is_symlink()
        assert link.resolve() == ROOT / name


def test_the_wheel_holds_one_top_level_package(tmp_path: Path) -> None:
    """Built from what git would check out, so that forgotten files show."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True,
    ).stdout.decode().split("\0")  # fmt: skip
    source = tmp_path / "source"
    for name in filter(None, listing):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to((ROOT / name).readlink())
        elif (ROOT / name).exists():
            target.write_bytes((ROOT / name).read_bytes())
    import sys
    import zipfile

    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "-w", str(tmp_path), str(source)],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"kvcm_ray"}
    for link in LINKS:
        assert any(name.startswith(f"kvcm_ray/{link}/") for name in names), link
    assert "kvcm_ray/py.typed" in names


def test_assertions_are_on() -> None:
    assert __debug__, "run without -O: assertions are part of the product"
