"""Managers that require accounts: one for a test, and one for all tests that leave its accounts alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcm_ray.serve_app.options import GatewayOptions
from kvcm_ray.testing.access import Guarded, cheap_passwords


@pytest.fixture
def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guarded]:
    cheap_passwords(monkeypatch)
    http = Guarded(tmp_path)
    http.allow_any_number_of_guesses()
    yield http
    http.close()


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with pytest.MonkeyPatch.context() as patch:
        cheap_passwords(patch)
        http = Guarded(tmp_path_factory.mktemp("crowd"), GatewayOptions(debug_api=True))
        http.allow_any_number_of_guesses()
        yield http
        http.close()
