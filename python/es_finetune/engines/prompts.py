"""From prompts to tokens, the same for every engine."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from es_finetune.engines import Answer
from es_finetune.errors import UserError

Prompt = str | Sequence[dict]


class PromptError(UserError):
    """A prompt that cannot be asked, or `what` else of it: its place in the list that was given, and what is wrong with
    it, as it follows "the prompt"."""

    def __init__(self, number: int, problem: str, what: str = "prompt"):
        super().__init__(number, problem, what)
        self.number, self.problem, self.what = number, problem, what

    def __str__(self) -> str:
        return f"{self.what} {self.number} {self.problem}"


def tokenize(tokenizer, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt: text with the special tokens that the tokenizer adds by itself, messages as its chat
    template says. PromptError for messages that it cannot render."""
    return _tokens(tokenizer, prompts, _rendered(tokenizer, prompts))


def continuations(
    tokenizer, prompts: Sequence[Prompt], answers: Sequence[str | Answer], end: int | None
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and what follows them, for reading an answer as the model would write it.

    An answer follows a text at once, and a chat after the template's generation prompt. Its tokens are those that
    follow the prompt's where both are tokenised as one text; where a token would reach across the border, those of the
    answer by itself, for a model that answers has the prompt's tokens before it. The end token comes last: that the
    answer is over is part of it.

    Args:
        tokenizer: Of the model.
        prompts: Texts or chats.
        answers: One for each. An Answer is its ids, as they are.
        end: The end token; None: the model knows none.

    Returns:
        Token ids of each prompt (`tokenize`) and of each answer.

    Raises:
        PromptError: Messages that the chat template cannot render, or an answer without tokens.
    """
    rendered = _rendered(tokenizer, prompts)
    before = _tokens(tokenizer, prompts, rendered)
    texts = [answer if isinstance(answer, str) else "" for answer in answers]
    whole = _tokens(tokenizer, prompts, [text + answer for text, answer in zip(rendered, texts, strict=True)])
    after = []
    for number, answer in enumerate(answers):
        if not isinstance(answer, str):
            after.append(list(answer.ids))
            continue
        border = len(before[number])
        ids = whole[number][border:]
        if whole[number][:border] != before[number]:
            ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        if not ids:
            raise PromptError(number, f"{answer!r:.40} has no tokens", "answer")
        after.append([*ids, *([] if end is None else [end])])
    return before, after


def _rendered(tokenizer, prompts: Sequence[Prompt]) -> list[str]:
    return [
        prompt if isinstance(prompt, str) else _render(tokenizer, number, prompt)
        for number, prompt in enumerate(prompts)
    ]


def _tokens(tokenizer, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[list[int]]:
    """Of each prompt's text, or longer text that begins with it."""
    ids: list[list[int]] = [[]] * len(texts)
    for raw in (True, False):  # the template has written the special tokens of a chat already
        rows = [row for row, prompt in enumerate(prompts) if isinstance(prompt, str) == raw]
        if rows:
            encoded = tokenizer([texts[row] for row in rows], add_special_tokens=raw)["input_ids"]
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


def end_token(tokenizer, ends: Collection[int]) -> int | None:
    """The one of the tokens at which a model stops that ends an answer: the tokenizer's own, or the first; None if
    there is none."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id in ends else min(ends, default=None)


def refuse_unreadable(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], positions: float, vocabulary: float
) -> None:
    """PromptError for a prompt that is empty, or an answer whose tokens do not fit behind it into so many positions or
    into the vocabulary."""
    refuse_unanswerable(prompts, 0, math.inf, vocabulary)
    for number, (before, after) in enumerate(zip(prompts, answers, strict=True)):
        if len(before) + len(after) > positions:
            raise PromptError(
                number,
                f"has {len(after)} tokens, too many after {len(before)} of the prompt within the model's {positions} "
                "positions: shorten one of them",
                "answer",
            )
        if max(after, default=0) >= vocabulary:
            raise PromptError(
                number,
                f"has token number {max(after)}, but the model embeds {vocabulary} tokens: use the tokenizer that "
                "belongs to it",
                "answer",
            )


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
