"""Engines: text from the weights as they are at the moment of the call. `Engine` is all that the rest of es_finetune
knows of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:  # a check of options imports this module, and no torch
    from es_finetune.models.members import MemberNoise

DECODINGS = ("dynamic", "static", "continuous")  # of hf.HFEngine; here, for a check of options loads no engine


class Answer(NamedTuple):
    """What a model wrote: `ids` are the new tokens without padding, with the end token if it came; `text` leaves
    special tokens out."""

    text: str
    ids: tuple[int, ...]


class Engine(Protocol):
    """`encode` does what does not depend on the weights, once for all members; its result is only for `generate` of the
    same engine. A prompt is text, taken as it is, or chat messages ({"role", "content"} each). prompts.PromptError for
    one that cannot be asked.

    `generate` returns one answer per prompt, in the prompts' order, and the same answers for the same weights. It must
    keep nothing between calls that was computed from weights: no KV cache, no shared prefix.
    """

    temperature: float  # 0: greedy

    def encode(self, prompts: Sequence[str | Sequence[dict]]) -> Any: ...

    def generate(self, encoded: Any) -> list[Answer]: ...


class MembersEngine(Engine, Protocol):
    """An engine that also answers for several members in one batch, whose noise is of low rank.

    `generate_members` takes what `encode` made for as many members or more, and the noise of each param_group (of the
    same members); theta is in place and stays there. It returns the answers of each member as `generate` does.
    """

    def encode(self, prompts: Sequence[str | Sequence[dict]], members: int = 1) -> Any: ...

    def generate_members(self, encoded: Any, noise: Sequence[MemberNoise]) -> list[list[Answer]]: ...
