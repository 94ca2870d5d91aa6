"""The pages of the documentation, and their code blocks."""

import pathlib
import re
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[2]


class Block(NamedTuple):
    page: str
    language: str
    text: str


@pytest.fixture(scope="session")
def pages():
    """Path in the repository -> text: what stands at its root, the site, and the pages that it takes from elsewhere."""
    beside = [ROOT / name for name in ("bench/README.md", "es_kernels/NOISE.md", "examples/README.md")]
    paths = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *beside]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(paths)}


@pytest.fixture(scope="session")
def blocks(pages):
    """Their fenced blocks, in order."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [Block(page, *block) for page, text in pages.items() for block in fence.findall(text)]


@pytest.fixture(scope="session")
def inline(pages):
    """(page, text) of what stands in backticks outside of blocks."""
    fence = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
    return [(page, code) for page, text in pages.items() for code in re.findall(r"`([^`\n]+)`", fence.sub("", text))]
