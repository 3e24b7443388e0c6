"""What mkdocs does beside its own work (mkdocs.yml lists this file): pages that are made, and links between folders.

Pages that lie elsewhere in the project (CONTRIBUTING.md and the like) join those of docs/. Three are made of the code:
the commands as their help says them, the passes as their docstrings do. A page of docs/ that the navigation does not
name yet is put under "More", so that every page can be reached.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from tools.pages.reference import commands_page, passes_page

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
MADE = {"commands.md": commands_page, "passes.md": passes_page}


def on_config(config: Any) -> Any:
    """Add pages to the navigation that it does not name."""
    named = set(pages_in(config.nav))
    more = sorted({path.name for path in Path(config.docs_dir).glob("*.md")} - named)
    if more:
        config.nav.append({"More": more})
    return config


def pages_in(nav: Any) -> list[str]:
    """The pages that a navigation names, whatever their depth."""
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [page for entry in entries for page in pages_in(entry)]


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made and those that lie outside of docs/."""
    for name in ELSEWHERE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for name, make in MADE.items():
        files.append(File.generated(config, name, content=make()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between docs/ and the project's folder lead to the pages of the site, which has one folder."""
    if page.file.src_uri in ELSEWHERE:
        return re.sub(r"\]\(docs/", "](", markdown)
    names = "|".join(map(re.escape, ELSEWHERE))
    return re.sub(rf"\]\(\.\./(?=(?:{names})\b)", "](", markdown)
