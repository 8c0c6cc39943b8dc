"""The console in a real headless Chromium, on a real manager with traffic.

Set KVCM_SCREENSHOTS to a folder to look at what the tests saw.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from kvcm_ray.actors.accounts import new_token
from kvcm_ray.client import connect
from kvcm_ray.core.model import AccessSettings, AccountRole
from kvcm_ray.testing.browser import Page, binary, browser
from kvcm_ray.testing.served import Served, served

pytestmark = pytest.mark.skipif(binary() is None, reason="no Chromium on this machine")

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("console") / "data") as running:
        talk(running, "llama-8b", conversations=4)
        talk(running, HOSTILE, conversations=2)
        yield running


def talk(manager: Served, instance_id: str, conversations: int, first: int = 0) -> None:
    """Prompts that begin alike, each written and then found."""
    with closing(connect(manager.url)) as client:
        cache = client.register(instance_id, "default", block_size=16, specs={"tp0": 4096})
        for number in range(first, first + conversations):
            keys = cache.block_keys([*range(640), *range(number * 10_000, number * 10_000 + 320)])
            cache.match(keys)
            cache.put(keys, np.full((len(keys), 4096), number, np.uint8))
            found = cache.match(keys).length
            cache.get(keys[:found], np.empty((found, 4096), np.uint8))


def shot(page: Page, name: str, tmp_path: Path) -> bytes:
    folder = Path(os.environ.get("KVCM_SCREENSHOTS", tmp_path))
    return page.screenshot(folder / f"{name}.png").read_bytes()


def show(page: Page, manager: Served, group: str = "default") -> None:
    page.errors.clear()
    page.requested.clear()
    page.open("about:blank")
    page.open(f"{manager.url}/console#{group}")
    page.wait_for("document.querySelectorAll('#instances tbody tr').length >= 2")


def test_a_group_is_told_whole(page: Page, manager: Served, tmp_path: Path) -> None:
    page.shape(1280, 900)
    show(page, manager)
    assert page.text("#group-name") == "default"
    assert "1.0 GiB" in page.text("#group-list")
    assert "%" in page.text("#group-list")
    assert "files" in page.text("#tiers")
    page.wait_for("document.querySelectorAll('#group-list .bar u').length === 2")  # both marks
    page.wait_for("document.querySelectorAll('.icicle button').length >= 2")
    page.wait_for("document.querySelectorAll('#chart-advice circle').length >= 3")
    page.wait_for("document.querySelector('#chart-hits .l1')?.getAttribute('d')")
    page.wait_for("document.querySelectorAll('#events li').length >= 1")
    page.click(".icicle button")
    assert "look-ups share these" in page.text("#prefix-told")
    page.evaluate("(kind => { kind.value = 'write_finished'; kind.dispatchEvent(new Event('change')); })"
                  "(document.getElementById('kind'))")  # fmt: skip
    assert "write finished" in page.text("#events")
    assert shot(page, "light", tmp_path)
    assert page.errors == []


def test_nothing_comes_from_elsewhere(page: Page, manager: Served) -> None:
    show(page, manager)
    assert {url for url in page.requested if not url.startswith((manager.url, "data:", "about:"))} == set()
    refused = page.evaluate("fetch('http://127.0.0.1:9/x').then(() => 'sent', () => 'refused')")
    assert refused == "refused"
    assert any("Content Security Policy" in error for error in page.errors)


def test_names_are_text(page: Page, manager: Served) -> None:
    show(page, manager)
    assert HOSTILE in page.text("#instances")
    assert page.evaluate("document.querySelectorAll('img').length") == 0


def test_it_updates_by_itself(page: Page, manager: Served) -> None:
    show(page, manager)
    before = page.text("#numbers")
    talk(manager, "llama-8b", conversations=3, first=100)
    page.wait_for(f"document.querySelector('#numbers').innerText !== {before!r}")
    assert page.errors == []


def test_dark_and_light_differ(page: Page, manager: Served, tmp_path: Path) -> None:
    show(page, manager)
    colours = {}
    for dark in (False, True):
        page.shape(1280, 900, dark=dark)
        colours[dark] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        shot(page, "dark" if dark else "light", tmp_path)
        assert contrast(page) > 4.5
    page.shape(1280, 900)
    assert colours[False] != colours[True]


def contrast(page: Page) -> float:
    """Of the quiet text on a card, the least that there is; as WCAG 2 defines it."""
    style = "getComputedStyle(document.querySelector('.quiet'))"
    card = "getComputedStyle(document.querySelector('article'))"
    ink, ground = (
        [int(part) for part in page.evaluate(f"{rule}").removeprefix("rgb(").removesuffix(")").split(",")]
        for rule in (f"{style}.color", f"{card}.backgroundColor")
    )
    light, dark = sorted((_luminance(ink), _luminance(ground)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: list[int]) -> float:
    linear = [(c / 255 / 12.92) if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_it_fits_a_phone(page: Page, manager: Served, tmp_path: Path) -> None:
    page.shape(390, 844, mobile=True)
    try:
        show(page, manager)
        shot(page, "phone", tmp_path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.evaluate("getComputedStyle(document.getElementById('groups')).display") == "none"
        page.click("#back a")
        page.wait_for("getComputedStyle(document.getElementById('groups')).display !== 'none'")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    finally:
        page.shape(1280, 900)


def test_the_root_leads_there(page: Page, manager: Served) -> None:
    page.open(manager.url)
    assert page.evaluate("location.pathname") == "/console"
    page.wait_for("location.hash === '#default'")  # the only group is shown at once


def test_it_asks_for_a_token(page: Page, tmp_path: Path) -> None:
    with served(tmp_path / "data") as guarded:
        token = require_accounts(guarded)
        page.open(f"{guarded.url}/console")
        page.wait_for("!document.getElementById('sign-in').hidden")
        assert page.evaluate("document.getElementById('main').hidden")
        sign_in(page, "wrong")
        page.wait_for("document.getElementById('sign-in-error').innerText.includes('not known')")
        sign_in(page, token)
        page.wait_for("document.querySelectorAll('#group-list li').length === 1")
        page.evaluate("sessionStorage.clear()")


def require_accounts(manager: Served) -> str:
    """Token of an account that the manager knows, from now on the only one that gets in."""
    secret, token = new_token("operator")

    async def change() -> None:
        registry = manager.backend.registry
        await registry("add_account", "operator", "correct horse", AccountRole.ROLE_ADMIN)
        await registry("add_token", token)
        await registry("set_access", AccessSettings(True))

    asyncio.run(change())
    return secret


def sign_in(page: Page, token: str) -> None:
    page.evaluate(f"document.getElementById('token').value = {token!r}")
    page.click("#sign-in button")


def test_a_manager_that_goes_away_is_told(page: Page, tmp_path: Path) -> None:
    with served(tmp_path / "data") as running:
        page.open(f"{running.url}/console")
        page.wait_for("document.querySelector('.dot.good') !== null")
    page.wait_for("document.querySelector('.dot.bad') !== null")
    assert page.text("#state-text")
