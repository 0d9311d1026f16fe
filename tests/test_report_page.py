"""`kvmmap report`: the page's content, and its layout in a real browser: light, dark, and on a phone."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.browser import CONTRAST, Browser
from helpers.cli_support import click_run, expect_line, flip, offset_of

import kvmmap

LAYERS = 6


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 700 positions with a key channel and a value row that stand out, and notes that are none of HTML."""
    path = tmp_path_factory.mktemp("report") / "prompt <1>.kvm"
    keys = np.random.default_rng(0).standard_normal((LAYERS, 700, 2, 64), dtype=np.float32)
    values = np.random.default_rng(1).standard_normal((LAYERS, 700, 2, 64), dtype=np.float32)
    keys[2, :, 1, 7] *= 40
    values[3, 123, 0] *= 60
    model = kvmmap.ModelInfo(name="some/model", rope={"theta": 1e5})
    notes = {"title": "<script>alert(1)</script>", "\x1b[31m&": "\u202eevil", "long": "word" * 200}
    with kvmmap.create(
        path, num_layers=LAYERS, capacity=1000, num_kv_heads=2, head_dim=64, model=model, metadata=notes
    ) as cache:
        cache.extend(keys, values, np.arange(700))
    return path


@pytest.fixture(scope="module")
def page(path: Path) -> Path:
    """The report on it."""
    page = path.with_name("report.html")
    result = click_run("report", path, "-o", page)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(f"{page}: ")
    return page


def test_the_page_says_what_the_api_says(path: Path, page: Path) -> None:
    text = page.read_text()
    with kvmmap.open(path) as cache:
        statistics = kvmmap.report.statistics(cache)
        report = kvmmap.report.inspect(cache)
        assert report.file_bytes is not None
    for words in (
        "<h1>prompt &lt;1&gt;.kvm</h1>",
        "6 layers, 700 positions of 1,000",
        "All checksums hold.",
        "some/model",
        "key-codes of layer 5",
        f"{statistics.keys.crest:.2f}",
        f"{statistics.values.crest:.2f}",
        "Compared 21 blocks",
        '<td class="word">2</td><td class="number">1</td><td class="number">7</td>',
        '<td class="word">3</td><td class="number">0</td><td class="number">123</td>',
    ):
        assert words in text, words


def test_metadata_is_shown_as_text_only(page: Path) -> None:
    text = page.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert text.isprintable() or all(c.isprintable() or c == "\n" for c in text)


def test_the_page_names_nothing_to_load(page: Path) -> None:
    text = page.read_text()
    assert "default-src &#x27;none&#x27;" in text
    for where in re.findall(r'(?:src|href|url|action)\s*[=(]\s*"?([^")\s>]+)', text):
        assert where.startswith("data:image/png;base64,"), where
    assert "http:" not in text
    assert "https:" not in text


def test_a_damaged_cache_is_reported(path: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.kvm"
    damaged.write_bytes(path.read_bytes())
    flip(damaged, offset_of(damaged, 4, 600))
    result = click_run("report", damaged, "-o", tmp_path / "out.html")
    assert result.exit_code == 1
    text = (tmp_path / "out.html").read_text()
    assert "Damaged in 1 place." in text
    assert "layer 4, positions [512, 700): checksum does not match" in text
    unchecked = click_run("report", "--no-verify", "--overwrite", damaged, "-o", tmp_path / "out.html")
    assert unchecked.exit_code == 0
    assert "They were not compared" in (tmp_path / "out.html").read_text()


def test_an_empty_cache_and_a_zarr_group(tmp_path: Path) -> None:
    empty = tmp_path / "empty.kvm"
    kvmmap.create(empty, num_layers=1, capacity=0, num_kv_heads=1, head_dim=8).close()
    assert click_run("report", empty, "-o", tmp_path / "out.html").exit_code == 0
    assert "0 of 0 positions" in (tmp_path / "out.html").read_text()
    pytest.importorskip("zarr")
    group = tmp_path / "group.zarr"
    x = np.random.default_rng(0).standard_normal((2, 300, 2, 8), dtype=np.float32)
    with kvmmap.create(group, num_layers=2, capacity=400, num_kv_heads=2, head_dim=8) as cache:
        cache.extend(x, x)
    assert click_run("report", group, "-o", tmp_path / "out.html", "--overwrite").exit_code == 0
    text = (tmp_path / "out.html").read_text()
    assert "300 positions of 400" in text
    assert "The whole file" not in text


def test_where_a_page_can_not_go(path: Path, tmp_path: Path) -> None:
    before = path.read_bytes()
    expect_line(click_run("report", path, "-o", path), 2, "is the cache itself")
    expect_line(click_run("report", path, "-o", tmp_path), 2, "is a directory")
    expect_line(click_run("report", path, "-o", tmp_path / "no" / "out.html"), 2, "no such directory")
    expect_line(click_run("report", tmp_path / "none.kvm", "-o", tmp_path / "out.html"), 2, "no such file")
    assert list(tmp_path.iterdir()) == []
    assert path.read_bytes() == before


# In a browser

SOUNDNESS = """
(() => ({
  headings: [...document.querySelectorAll("h1,h2,h3,h4,h5,h6")].map((h) => [Number(h.tagName[1]), h.textContent]),
  lang: document.documentElement.lang,
  title: document.title,
  viewport: document.querySelector("meta[name=viewport]").content,
  description: document.querySelector("meta[name=description]").content,
  landmarks: ["header", "main", "footer"].map((name) => document.querySelectorAll(name).length),
  unnamed: [...document.querySelectorAll("img, svg[role=img]")]
    .filter((e) => !(e.alt || e.getAttribute("aria-label"))).length,
  unscoped: document.querySelectorAll("th:not([scope])").length,
  broken: [...document.images].filter((image) => !image.naturalWidth).length,
  images: document.images.length,
  small: [...document.querySelectorAll("summary")].filter((e) => e.getBoundingClientRect().height < 40).length,
  tiny: [...document.querySelectorAll("svg text")].filter((e) => e.getBoundingClientRect().height < 9).length,
  wide: document.documentElement.scrollWidth - innerWidth,
  text: document.body.innerText,
}))()
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [(1200, 900), (390, 844), (320, 568)], ids=["desk", "phone", "small-phone"])
def test_the_page_in_a_browser(browser: Browser, page: Path, size: tuple[int, int], dark: bool) -> None:
    browser.requests.clear()
    browser.load(page.as_uri(), *size, dark=dark, phone=size[0] < 600)
    found: dict[str, Any] = browser.ask(SOUNDNESS)
    contrast = browser.ask(CONTRAST)
    assert [url for url in browser.requests if not url.startswith("data:")] == [page.as_uri()]
    assert browser.complaints == []
    levels = [level for level, _ in found["headings"]]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert (found["lang"], found["title"]) == ("en", "prompt <1>.kvm: kvmmap report")
    assert "width=device-width" in found["viewport"]
    assert found["description"]
    assert found["landmarks"] == [1, 1, 1]
    assert found["images"] >= 4
    for fault in ("unnamed", "unscoped", "broken", "small", "tiny"):
        assert found[fault] == 0, fault
    assert found["wide"] <= 0  # nothing makes the page itself scroll sideways
    assert contrast["poor"] == []
    assert contrast["seen"] > 100
    for words in ("What it holds", "The file", "Scales", "What int8 costs", "What stands out", "Checksums", "Sound."):
        assert words in found["text"]


def test_the_browser_would_have_complained(browser: Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!DOCTYPE html><meta charset=utf-8><body style='color:#aaa;background:#fff'>pale"
        "<img src='http://127.0.0.1:9/x.png'><script>console.error('no'); nothing()</script>"
    )
    browser.load(bad.as_uri())
    assert "http://127.0.0.1:9/x.png" in browser.requests
    assert len(browser.complaints) >= 2
    assert [text for text, _ in browser.ask(CONTRAST)["poor"]] == ["pale"]
