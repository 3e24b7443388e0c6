"""The documentation site builds, every link in it leads somewhere, and reading it needs no network.

Runs where the extra `docs` is installed, as `python3 tools/run.py test` does it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from passes import all_passes
from tests import ROOT
from tests.documents import PAGES, README
from tools.run import SITE


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; the build fails on a link, an anchor or a name in the Python reference that is not there."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, *SITE, "--site-dir", str(folder)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_there_and_in_the_navigation(site: Path) -> None:
    index = (site / "index.html").read_text(encoding="utf-8")
    own = {page.stem for page in PAGES if page != README} - {"index"}
    for name in own | {"commands", "passes", "CONTRIBUTING", "SECURITY", "CHANGELOG"}:
        assert (site / f"{name}.html").is_file()
        assert f'href="{name}.html"' in index, name


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    loads = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=["']?(https?:)?//[^>]*>""")
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        found = [tag[0] for tag in loads.finditer(page.read_text(encoding="utf-8"))]
        assert not [tag for tag in found if "canonical" not in tag], page
    for style in site.rglob("*.css"):
        assert not re.search(r"""(?:url\(["']?|@import\s+["'])https?:""", style.read_text(encoding="utf-8"))


def test_the_search_works_on_a_disk(site: Path) -> None:
    text = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    entries = json.loads(text.removeprefix("var __index = "))["docs"]
    places = {entry["location"].partition("#")[0] for entry in entries}
    assert {"troubleshooting.html", "api.html", "commands.html", "CONTRIBUTING.html"} <= places
    assert "assets/iframe-worker.js" in (site / "index.html").read_text(encoding="utf-8")


def test_reference_pages_hold_what_the_code_has(site: Path) -> None:
    commands = (site / "commands.html").read_text(encoding="utf-8")
    assert "diffc cache search" in commands
    assert "--quantize-mha" in commands
    passes = (site / "passes.html").read_text(encoding="utf-8")
    assert all(f'id="{name}"' in passes for name in all_passes())
    api = (site / "api.html").read_text(encoding="utf-8")
    for name in (
        "diffc.compile.request.CompileRequest",
        "diffc.runtime.load.load",
        "passes.pipeline.Pipeline",
    ):
        assert f'id="{name}"' in api
    assert "Everything that a compile depends on" in api
