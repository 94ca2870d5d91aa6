"""Contract: every message that the page on troubleshooting quotes is one that the source can print."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
ANY = "…"


def templates():
    """The texts in the source, with … for what is filled in."""
    texts = set()
    for folder in ("es_kernels", "python"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    texts.add("".join(part.value if isinstance(part, ast.Constant) else ANY for part in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 9:
                    texts.add(node.value)
    return texts


def matches(quote, template):
    """Whether the template makes the quote, and is not … alone. A … of the quote stands for any text in the message."""
    parts = template.split(ANY)
    return (
        sum(map(len, parts)) > 0.4 * len(quote)
        and all(part in quote for part in parts)
        and re.fullmatch(".*".join(map(re.escape, parts)), quote) is not None
    )


def is_made(quote, texts):
    """By one text; or by two, as a warning is: its kind, and what follows."""
    starts = [text for text in texts if ANY not in text and quote.startswith(text)]
    return any(matches(quote, text) for text in texts) or any(
        matches(quote[len(start) :], text) for start in starts for text in texts
    )


def test_every_message_is_in_the_source(blocks):
    quotes = [
        line
        for block in blocks
        if block.page == "docs/guides/troubleshooting.md" and block.language == "text"
        for line in block.text.splitlines()
    ]
    assert len(quotes) > 30
    texts = templates()
    assert [quote for quote in quotes if not is_made(quote, texts)] == []
    assert not is_made(
        "output … holds a run: --resume continues it, --overwrite removes it, --output gives another folder", texts
    )
