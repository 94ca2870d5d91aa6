"""From prompts to tokens, the same for every engine."""

from __future__ import annotations

import math
from collections.abc import Sequence

from es_finetune.errors import UserError

Prompt = str | Sequence[dict]


class PromptError(UserError):
    """A prompt that cannot be asked: its place in the list that was given, and what is wrong with it, as it follows
    "the prompt"."""

    def __init__(self, number: int, problem: str):
        super().__init__(number, problem)
        self.number, self.problem = number, problem

    def __str__(self) -> str:
        return f"prompt {self.number} {self.problem}"


def tokenize(tokenizer, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt: text with the special tokens that the tokenizer adds by itself, messages as its chat
    template says. PromptError for messages that it cannot render."""
    rendered = [
        prompt if isinstance(prompt, str) else _render(tokenizer, number, prompt)
        for number, prompt in enumerate(prompts)
    ]
    ids: list[list[int]] = [[]] * len(rendered)
    for raw in (True, False):  # the template has written the special tokens of a chat already
        rows = [row for row, prompt in enumerate(prompts) if isinstance(prompt, str) == raw]
        if rows:
            encoded = tokenizer([rendered[row] for row in rows], add_special_tokens=raw)["input_ids"]
            for row, tokens in zip(rows, encoded, strict=True):
                ids[row] = tokens
    return ids


def positions_of(model) -> float:
    """How many tokens the model can place. A config that gives no number, or -1 as XLNet's, knows no limit."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions if positions and positions > 0 else math.inf


def vocabulary_of(model) -> float:
    """How many tokens the model embeds."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return math.inf if weight is None else weight.shape[0]


def refuse_unanswerable(
    tokens: Sequence[Sequence[int]], max_new_tokens: int, positions: float, vocabulary: float
) -> None:
    """PromptError for a prompt that is empty, or too long for so many positions with `max_new_tokens` after it, or has
    a token beyond the vocabulary."""
    for number, ids in enumerate(tokens):
        if not ids:
            raise PromptError(
                number, "has no tokens: leave it out, or use a tokenizer that begins texts with a special token"
            )
        if len(ids) + max_new_tokens > positions:
            raise PromptError(
                number,
                f"has {len(ids)} tokens, too many for {max_new_tokens} new ones within the model's {positions} "
                "positions: shorten it, or lower max_new_tokens",
            )
        if max(ids) >= vocabulary:
            raise PromptError(
                number,
                f"has token number {max(ids)}, but the model embeds {vocabulary} tokens: use the tokenizer that "
                "belongs to it",
            )


def _render(tokenizer, number: int, messages: Sequence[dict]) -> str:
    if tokenizer.chat_template is None:
        raise PromptError(
            number,
            "is a chat, but the tokenizer has no chat template: use an instruction-tuned model, or prompts of plain "
            "text",
        )
    try:
        return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template raises what it likes
        raise PromptError(number, f"is refused by the tokenizer's chat template: {error}") from error
