"""Pictures of a page in Chromium or Chrome, for the documents: the top of it, or the part below a heading.

    python -m tools.pages.screens build/report.html docs/report-phone.webp [--screen phone] [--dark] [--part errors]
                                  [--height 1600]

Needs the extra `browser`, and the program on the machine.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
SCREENS = {"desktop": (1280, 900), "phone": (360, 740)}
"""Width and height in pixels."""


def program() -> str | None:
    """The browser of this machine; None without one."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextmanager
def browser() -> Iterator[Any]:
    """A browser without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=program(), args=["--no-sandbox"])
        yield launched
        launched.close()


def opened(browser: Any, file: Path, screen: str, scheme: str) -> Any:
    """A page of `browser` with the `file` in it, at the width of a `screen`, "light" or "dark"."""
    width, height = SCREENS[screen]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.goto(file.absolute().as_uri())
    return page


def main() -> int:
    """Take the picture that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("picture", type=Path, help="a .webp file")
    parser.add_argument("--screen", choices=SCREENS, default="desktop")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--part", help="the id of a section; the top of the page without it")
    parser.add_argument("--height", type=int, default=1600, help="pixels, at most")
    wanted = parser.parse_args()
    with browser() as running:
        page = opened(running, wanted.file, wanted.screen, "dark" if wanted.dark else "light")
        page.add_style_tag(content="nav { position: static !important; }")
        top = page.locator(f"section#{wanted.part}").bounding_box()["y"] if wanted.part else 0
        shot = page.screenshot(full_page=True)
    image = Image.open(BytesIO(shot)).convert("RGB")
    box = (0, int(top), image.width, min(image.height, int(top) + wanted.height))
    image.crop(box).save(wanted.picture, quality=72, method=6)
    return 0


if __name__ == "__main__":
    sys.exit(main())
