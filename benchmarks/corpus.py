"""Real texts of different kinds, which Python, its packages and Debian's packages have: nothing is downloaded.

A text that this machine lacks is left out, and said so: figures depend on which texts there are, so results keep each
text's name and digest.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.metadata
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A text, and what it is."""

    name: str
    kind: str
    text: str

    @property
    def digest(self) -> str:
        """The first 16 hexadecimal digits of its SHA-256."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def _manual() -> str:
    from pydoc_data.topics import topics

    return str(topics["compound"])


def _module_file(module: str, path: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"no module {module}")
    return Path(spec.origin).parent / path


def _packaged(module: str, path: str) -> Callable[[Path], str]:
    return lambda root: _read(_module_file(module, path))


def _system(pattern: str) -> Callable[[Path], str]:
    """Read the first file that there is for a pattern: below the given root, or else the system's."""

    def read(root: Path) -> str:
        for base in (root, Path("/")):
            for path in sorted(base.glob(pattern)):
                return _read(path)
        raise FileNotFoundError(f"/{pattern}")

    return read


def _read(path: Path) -> str:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return data.decode("utf-8")


def _readme(package: str) -> str:
    try:
        text = importlib.metadata.distribution(package).read_text("METADATA")
    except importlib.metadata.PackageNotFoundError as error:
        raise FileNotFoundError(f"package {package}") from error
    assert text is not None
    return text.partition("\n\n")[2]


def _distributed(package: str, name: str) -> str:
    """Read a file that a package was installed with, wherever it lies."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise FileNotFoundError(f"package {package}") from error
    for file in files:
        if file.name == name:
            return _read(Path(str(file.locate())))
    raise FileNotFoundError(f"{name} of package {package}")


def _without_commands(read: Callable[[Path], str]) -> Callable[[Path], str]:
    """Read a manual page as prose, without its formatting commands."""

    def plain(root: Path) -> str:
        lines = [line for line in read(root).splitlines() if not line.startswith((".", "'"))]
        return re.sub(r"\\f.|\\&|\\%|\\\|", "", "\n".join(lines)).replace("\\-", "-")

    return plain


SOURCES: dict[str, tuple[str, Callable[[Path], str]]] = {
    "manual": ("English prose", lambda root: _manual()),
    "essay": ("English prose", _system("usr/share/perl/5*/Locale/Maketext/TPJ13.pod")),
    "quotations": ("English prose", _system("usr/share/games/fortunes/people")),
    "licence": ("English prose", _system("usr/share/common-licenses/GFDL-1.3")),
    "changelog": ("changelog", _packaged("idlelib", "NEWS.txt")),
    "readme": ("Markdown", lambda root: _readme("rich")),
    "python": ("code", lambda root: inspect.getsource(argparse)),
    "c++": ("code", _packaged("torch", "include/c10/util/SmallVector.h")),
    "javascript": ("code", _packaged("matplotlib", "backends/web_backend/js/mpl.js")),
    "html": ("markup", _packaged("idlelib", "help.html")),
    "troff": ("markup", _system("usr/share/man/man1/bash.1.gz")),
    "json": ("data", lambda root: _distributed("pydantic_core", "pydantic-core.cyclonedx.json")),
    "csv": ("data", _packaged("matplotlib", "mpl-data/sample_data/msft.csv")),
    "log": ("log", _system("var/log/dpkg.log")),
    "german": ("other language", _system("usr/share/vim/vim9*/tutor/tutor.de.utf-8")),
    "russian": ("other language", _system("usr/share/vim/vim9*/tutor/tutor.ru.utf-8")),
    "chinese": ("other language", _system("usr/share/vim/vim9*/tutor/tutor.zh_cn.utf-8")),
    "french": ("other language", _without_commands(_system("usr/share/man/fr/man1/dpkg.1.gz"))),
}
"""Each text's kind, and how to read it. Packages of Debian: perl-modules, fortunes, base-files, man-db, bash,
vim-runtime, dpkg."""


def texts(root: Path, missing: Callable[[str, str], object]) -> Iterator[Text]:
    """Yield the texts that there are.

    Args:
        root: a directory in which packages of Debian were unpacked (`dpkg -x`); the system's own count besides.
        missing: called with the name of a text that is not there, and what is missing.
    """
    for name, (kind, read) in SOURCES.items():
        try:
            yield Text(name=name, kind=kind, text=read(root))
        except (OSError, ImportError) as error:
            missing(name, str(error))
