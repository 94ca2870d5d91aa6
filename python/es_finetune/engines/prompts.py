"""From prompts to tokens, the same for every engine."""

from __future__ import annotations

import math
from collections.abc import Sequence

Prompt = str | Sequence[dict]


def tokenize(tokenizer, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt: text with the special tokens that the tokenizer adds by itself, messages as its chat template says."""
    rendered = [prompt if isinstance(prompt, str) else _render(tokenizer, number, prompt) for number, prompt in enumerate(prompts)]
    ids: list[list[int]] = [[]] * len(rendered)
    for raw in (True, False):  # the template has written the special tokens of a chat already
        rows = [row for row, prompt in enumerate(prompts) if isinstance(prompt, str) == raw]
        if rows:
            found = tokenizer([rendered[row] for row in rows], add_special_tokens=raw)["input_ids"]
            for row, tokens in zip(rows, found, strict=True):
                ids[row] = tokens
    return ids


def positions_of(model) -> float:
    """How many tokens the model can place. A config that gives no number, or -1 as XLNet's, knows no limit."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions if positions and positions > 0 else math.inf


def refuse_unanswerable(tokens: Sequence[Sequence[int]], max_new_tokens: int, positions: float) -> None:
    """ValueError for a prompt that is empty, or too long for the model's positions with `max_new_tokens` after it."""
    for number, ids in enumerate(tokens):
        if not ids:
            raise ValueError(f"prompt {number} has no tokens: leave it out, or use a tokenizer that begins texts with a special token")
        if len(ids) + max_new_tokens > positions:
            raise ValueError(
                f"prompt {number} has {len(ids)} tokens, too many for {max_new_tokens} new ones within the model's {positions} "
                f"positions: shorten it, or lower max_new_tokens"
            )


def _render(tokenizer, number: int, messages: Sequence[dict]) -> str:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"prompt {number} is a chat, but the tokenizer has no chat template: use an instruction-tuned model, or prompts of plain text"
        )
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise ValueError(f"prompt {number}: the tokenizer's chat template refuses the messages: {error}") from error
