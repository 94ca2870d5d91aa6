"""Engines: text from the weights as they are at the moment of the call. `Engine` is all that the rest of es_finetune
knows of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:  # a check of options imports this module, and no torch
    import torch

    from es_finetune.models.members import MemberNoise

DECODINGS = ("dynamic", "static", "continuous")  # of hf.HFEngine; here, for a check of options loads no engine


class Answer(NamedTuple):
    """What a model wrote: `ids` are the new tokens without padding, with the end token if it came; `text` leaves
    special tokens out."""

    text: str
    ids: tuple[int, ...]


class Sampling(NamedTuple):
    """How answers are drawn, from the whole vocabulary (no top_k, no top_p).

    Attributes:
        temperature: Above 0.
        seed: u64. With the place of a prompt in the list it decides that prompt's random numbers, whatever the weights
            and whatever the other prompts: members share them, in one batch and one by one.
    """

    temperature: float
    seed: int


class Engine(Protocol):
    """`encode` does what does not depend on the weights, once for all members; its result is only for `generate` of the
    same engine. A prompt is text, taken as it is, or chat messages ({"role", "content"} each). prompts.PromptError for
    one that cannot be asked.

    `generate` returns one answer per prompt, in the prompts' order, and the same answers for the same weights; greedy
    ones without a Sampling. It must keep nothing between calls that was computed from weights: no KV cache, no shared
    prefix.

    `log_probs` reads given answers instead (`prompts.continuations` says as which tokens): of each one f32 tensor on
    the CPU, the natural log of the probability of each of its tokens, at temperature 1. PromptError by
    `encode_answers` for one that cannot be read.
    """

    def encode(self, prompts: Sequence[str | Sequence[dict]]) -> Any: ...

    def generate(self, encoded: Any, sampling: Sampling | None = None) -> list[Answer]: ...

    def encode_answers(self, prompts: Sequence[str | Sequence[dict]], answers: Sequence[str | Answer]) -> Any: ...

    def log_probs(self, encoded: Any) -> list[torch.Tensor]: ...


class MembersEngine(Engine, Protocol):
    """An engine that also answers for several members in one batch, whose noise is of low rank.

    `generate_members` takes what `encode` made for as many members or more, and the noise of each param_group (of the
    same members); theta is in place and stays there. It returns the answers of each member as `generate` does.
    `log_probs_members` is to `log_probs` what it is to `generate`.
    """

    def encode(self, prompts: Sequence[str | Sequence[dict]], members: int = 1) -> Any: ...

    def generate_members(
        self, encoded: Any, noise: Sequence[MemberNoise], sampling: Sampling | None = None
    ) -> list[list[Answer]]: ...

    def encode_answers(
        self, prompts: Sequence[str | Sequence[dict]], answers: Sequence[str | Answer], members: int = 1
    ) -> Any: ...

    def log_probs_members(self, encoded: Any, noise: Sequence[MemberNoise]) -> list[list[torch.Tensor]]: ...
