"""Notebooks in examples/ run, and print what is in them.

``python tests/docs/test_notebook.py`` runs them and puts the new outputs in.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
BYTES_MAX = 200_000


def executed(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook, run in this folder, without what differs from run to run."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, kernel_name="python3", timeout=120, record_timing=False).execute(cwd=str(folder))
    del notebook.metadata["language_info"]
    return notebook


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    """What each cell wrote to standard output."""
    return [
        "".join(output.text for output in cell.outputs if output.output_type == "stream")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_run_and_print_what_is_in_them(path: Path, tmp_path: Path) -> None:
    kept = nbformat.read(path, as_version=4)
    assert printed(executed(path, tmp_path)) == printed(kept)
    assert path.stat().st_size < BYTES_MAX
    assert any(
        "image/svg+xml" in output.get("data", {}) for cell in kept.cells for output in cell.get("outputs", [])
    )


if __name__ == "__main__":
    for notebook in NOTEBOOKS:
        nbformat.write(executed(notebook, ROOT), notebook)
