"""Check the built site: every link and anchor exists, nothing is loaded from other sites, and the API is complete.

    python docs/tools/check.py site

Prints what is wrong, one a line; exit code 1 if anything is. Uses what `make docs` installs, and not kvmmap itself.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import griffe

ROOT = Path(__file__).resolve().parents[2]
LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "audio": "src", "video": "src"}
"""Elements that load what an attribute names. `link` is another matter: some of its kinds do."""

PUBLIC = (
    *("kvmmap", "kvmmap.report"),
    *("kvmmap.integrations.transformers", "kvmmap.integrations.llama_cpp", "kvmmap.integrations.vllm"),
    "kvmmap.integrations.mlx",
)


class Page(HTMLParser):
    """What a page defines, refers to and loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self._style = False
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        facts = {name: value or "" for name, value in attributes}
        self.ids |= {facts[name] for name in ("id", "name") if name in facts}
        if tag == "a" and "href" in facts:
            self.links.append(facts["href"])
        if tag == "link" and facts.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(facts.get("href", ""))
        if tag in LOADING and LOADING[tag] in facts:
            self.loads.append(facts[LOADING[tag]])
        self.loads += urls(facts.get("style", ""))
        self._style = tag == "style"

    def handle_data(self, data: str) -> None:
        if self._style:
            self.loads += urls(data)


def urls(css: str) -> list[str]:
    """What a style sheet loads."""
    return [first or second for first, second in re.findall(r'url\(["\']?([^"\')]+)|@import\s+["\']([^"\']+)', css)]


def main() -> int:
    site = Path(sys.argv[1]).resolve()
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    wrong = [*broken(site, pages), *external(site, pages), *undocumented(site, pages)]
    print("\n".join(wrong) or f"{len(pages)} pages: all links lead somewhere, and nothing is loaded from elsewhere")
    return 1 if wrong else 0


def broken(site: Path, pages: dict[Path, Page]) -> Iterator[str]:
    """Links within the site whose targets do not exist."""
    for path, page in pages.items():
        if path.name == "404.html":  # its links are those of a server's root
            continue
        for link in [*page.links, *page.loads]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            here = path.relative_to(site)
            if not target.exists():
                yield f"{here}: {link}: there is no such file"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                yield f"{here}: {link}: there is no such anchor"


def external(site: Path, pages: dict[Path, Page]) -> Iterator[str]:
    """What pages and style sheets load from other sites."""
    loads = {path: page.loads for path, page in pages.items()}
    loads |= {path: urls(path.read_text()) for path in site.rglob("*.css")}
    for path, links in loads.items():
        for link in links:
            if urlsplit(link).netloc:
                yield f"{path.relative_to(site)}: loads {link}"


def undocumented(site: Path, pages: dict[Path, Page]) -> Iterator[str]:
    """Public names, and public members of public classes, that no page of the API has."""
    known = set().union(*(page.ids for path, page in pages.items() if path.is_relative_to(site / "api")))
    for name, described in public_names():
        if name not in known:
            yield f"api/: {name} is missing"
        if not described:
            yield f"{name} has no docstring"


def public_names() -> Iterator[tuple[str, bool]]:
    """Yield what a user may use, and whether it has a docstring."""
    package = griffe.load("kvmmap", search_paths=[ROOT], resolve_aliases=True)
    for module in PUBLIC:
        for name in exported(module):
            thing = package[f"{module}.{name}".removeprefix("kvmmap.")]
            thing = thing.final_target if thing.is_alias else thing
            if thing.is_module:
                continue
            yield f"{module}.{name}", thing.has_docstring
            if thing.is_class:
                for member in thing.members.values():
                    if not member.name.startswith("_") and not member.is_alias:
                        yield f"{module}.{name}.{member.name}", member.has_docstring


def exported(module: str) -> list[str]:
    """Return a package's `__all__`."""
    tree = ast.parse((ROOT / module.replace(".", "/") / "__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    raise SystemExit(f"{module} has no __all__")


if __name__ == "__main__":
    sys.exit(main())
