"""What the site needs beside MkDocs: pages link to files outside docs/, and nothing is fetched from elsewhere.

Pages are written for a code host, so a link to `../benchmarks/ovi/results/compbench.md` is one from `docs/`. The site
gets a copy of such a file at its path from the repository's root, and links that lead there.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
ELSEWHERE = re.compile(
    r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\s\"'>]+)", re.I
)
CANONICAL = ("CONTRIBUTING.md", "CHANGELOG.md")
"""Files outside docs/ that stand in the navigation."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to outside docs/, and what those files link to."""
    waiting = [(path, ROOT / path) for path in CANONICAL]
    for file in files.documentation_pages():
        waiting += linked(f"docs/{file.src_uri}", Path(file.abs_src_path or "").read_text(encoding="utf-8"))
    while waiting:
        path, source = waiting.pop()
        if files.get_file_from_path(path) is None and source.is_file():
            files.append(File.generated(config, path, abs_src_path=str(source)))
            if path.endswith(".md"):
                waiting += linked(path, source.read_text(encoding="utf-8"))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between places in the repository into links between places on the site."""
    here = page.file.src_uri
    origin = here if page.file.generated_by else f"docs/{here}"

    def moved(found: re.Match[str]) -> str:
        target = resolve(origin, found[2])
        return found[1] + posixpath.relpath(below_site(target), posixpath.dirname(here) or ".") + found[3]

    return LINK.sub(moved, markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Raise unless every page shows itself without another machine."""
    for page in Path(config.site_dir).rglob("*.html"):
        for address in ELSEWHERE.findall(page.read_text(encoding="utf-8")):
            raise PluginError(f"{page.name} fetches {address}: the site has to show itself offline")


def linked(origin: str, text: str) -> list[tuple[str, Path]]:
    """Paths from the repository's root, outside docs/, that a file links to."""
    targets = {resolve(origin, link) for _, link, _ in LINK.findall(text)}
    return [(target, ROOT / target) for target in sorted(targets) if not target.startswith("docs/")]


def resolve(origin: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))


def below_site(path: str) -> str:
    """Where a file of the repository lies below the site's root."""
    return path.removeprefix("docs/")
