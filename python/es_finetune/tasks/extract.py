"""The part of a completion that is graded. Each function is linear in the length of the text, unlike a lazy regular
expression."""

from __future__ import annotations

MAX_BOXED = 1000  # characters looked at after the last \boxed; the longest answer of MATH has 159


def last_block(text: str, tag: str) -> str | None:
    """Inside of the last complete <tag>...</tag>, or None."""
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return text[start + len(tag) + 2 : end] if start >= 0 else None


def last_boxed(text: str) -> str | None:
    r"""Inside of the last \boxed{...}, its braces balanced, stripped; None where there is none or it is empty.

    "\boxed 5", which solutions of MATH also write, is 5.
    """
    start = text.rfind("\\boxed")
    if start < 0:
        return None
    tail = text[start + len("\\boxed") :][:MAX_BOXED]
    if not tail.startswith("{"):
        words = tail.split("$")[0].split(maxsplit=1) if tail.startswith(" ") else []
        return words[0] if words else None
    depth = 0
    for position, character in enumerate(tail):
        # An escaped brace is a character of the answer: \{1, 2\}.
        if character in "{}" and (position == 0 or tail[position - 1] != "\\"):
            depth += 1 if character == "{" else -1
            if depth == 0:
                return tail[1:position].strip() or None
    return None
