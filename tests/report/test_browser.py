"""The page in a real browser: no script runs, nothing is fetched, nothing is wider than the screen, dark and light.

Needs the extra `browser` and Chromium or Chrome on the machine; without them the tests are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffc.progress import Silent
from diffc.report.build import report
from diffc.report.request import ReportRequest
from tests.report.made import HOSTILE, made
from tools.pages import screens

pytest.importorskip("playwright.sync_api")
OVER = "[document.documentElement.scrollWidth, window.innerWidth]"
"""What a page is wide, and what the screen is."""
CONTRAST = """() => {
  const parts = [...document.querySelectorAll('h1, p, td, th, summary, dt, dd, a')];
  const light = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
    .map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4); return .2126*v[0] + .7152*v[1] + .0722*v[2]; };
  const page = light(getComputedStyle(document.body).backgroundColor);
  return Math.min(...parts.map(e => light(getComputedStyle(e).color))
    .map(l => (Math.max(l, page) + .05) / (Math.min(l, page) + .05)));
}"""
"""The least contrast of any text to the page, as WCAG defines it."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if screens.program() is None:
        pytest.skip("no Chromium or Chrome on this machine")
    with screens.browser() as running:
        yield running


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    one, other = made(folder / "one"), made(folder / "other", "blocks.0.attn.to_q")
    report(ReportRequest(one.folder, folder / "alone.html"), Silent())
    report(ReportRequest(one.folder, folder / "beside.html", against=other.folder), Silent())
    return folder


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", screens.SCREENS)
@pytest.mark.parametrize("name", ["alone", "beside"])
def test_a_page_is_read_on_every_screen(
    browser: Any, pages: Path, name: str, screen: str, scheme: str
) -> None:
    said: list[str] = []
    page = screens.opened(browser, pages / f"{name}.html", screen, scheme)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
    page.reload()
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    wide, screen_width = page.evaluate(OVER)
    assert wide <= screen_width
    assert page.evaluate(CONTRAST) >= 4.5
    picture = np.asarray(Image.open(BytesIO(page.screenshot())).convert("L"), float)
    assert picture.std() > 5, "nothing is painted"
    assert (picture.mean() > 128) == (scheme == "light")
    assert HOSTILE in page.inner_text("main")
    assert page.evaluate("document.querySelectorAll('svg.chart').length") >= 4
    assert said == []
    page.context.close()
