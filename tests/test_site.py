"""The built site in a real browser, opened from disk as a reader would: on a desk, on a phone, light and dark."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
from helpers.browser import CHROMIUM, Browser

ROOT = Path(__file__).parents[1]
MKDOCS = ROOT / ".venv-docs" / "bin" / "mkdocs"
PAGES = ["index", "tutorial", "performance", "comparison", "cli", "format", "howto/server", "api/cache", "api/layer"]

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here"),
    pytest.mark.skipif(not MKDOCS.exists(), reason="make docs makes what builds the site"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built anew."""
    folder = tmp_path_factory.mktemp("site")
    build = [MKDOCS, "build", "--quiet", "--strict", "--site-dir", folder]
    subprocess.run(build, cwd=ROOT, check=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_pages_fit_and_load_nothing_from_elsewhere(site: Path, browser: Browser, page: str) -> None:
    for width, dark in ((1300, False), (390, True)):
        browser.load(f"file://{site}/{page}.html", width, dark=dark, phone=width < 600)
        assert browser.ask("document.querySelector('h1').innerText")
        assert browser.ask("document.documentElement.scrollWidth") <= width, f"{page} is wider than {width}"
    assert [url for url in browser.requests if url.startswith("http")] == []
    assert browser.complaints == []


def test_charts_follow_the_colours_that_the_reader_chooses(site: Path, browser: Browser) -> None:
    browser.load(f"file://{site}/performance.html", dark=False)
    ink = "getComputedStyle(document.querySelector('.chart .title')).fill"
    assert browser.ask("document.querySelectorAll('svg.chart').length") >= 5
    light = browser.ask(ink)
    browser.ask("document.body.setAttribute('data-md-color-scheme', 'slate')")
    assert browser.ask(ink) != light


def test_search_works_from_disk(site: Path, browser: Browser) -> None:
    browser.load(f"file://{site}/index.html")
    browser.ask("document.querySelector('[data-md-component=search-query]').focus()")
    browser.send("Input.insertText", text="truncate")
    deadline = time.monotonic() + 30
    found = "Array.from(document.querySelectorAll('.md-search-result__link'), link => link.href).join(' ')"
    while "cli.html" not in browser.ask(found):
        assert time.monotonic() < deadline, "search finds nothing"
        time.sleep(0.1)
