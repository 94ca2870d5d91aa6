"""Greedy generation in batches, and its scores: the evaluation of one set of weights.

`Engine` is all that the rest of es_finetune knows of a text generator; `HFEngine` is the one over a transformers model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from es_finetune.tasks import Item, Score, Task


class Engine(Protocol):
    """Makes text from the weights as they are at the moment of the call.

    `encode` does what does not depend on the weights, once for all members; its result is only for `generate` of the same
    engine. `generate` returns one completion per prompt, in the prompts' order. It must keep nothing between calls that was
    computed from weights: no KV cache, no shared prefix.
    """

    def encode(self, prompts: Sequence[str]) -> Any: ...

    def generate(self, encoded: Any) -> list[str]: ...


@dataclass
class Evaluation:
    """Completions and scores in the items' order, and where the time went."""

    completions: list[str]
    scores: list[Score]
    seconds_generate: float
    seconds_score: float

    def mean(self, part: str) -> float:
        """Mean of one part of the scores, "reward", "exact" or "format"; exactly rounded, so independent of order."""
        return math.fsum(getattr(score, part) for score in self.scores) / len(self.scores)


class Evaluator:
    """One fixed set of questions, encoded once; call it for every member of a generation."""

    def __init__(self, engine: Engine, task: Task, items: Sequence[Item]):
        self.engine, self.task, self.items = engine, task, items
        self.encoded = engine.encode([item.prompt for item in items])

    def __call__(self) -> Evaluation:
        start = time.perf_counter()
        completions = self.engine.generate(self.encoded)
        generated = time.perf_counter()
        scores = [self.task.score(item, completion) for item, completion in zip(self.items, completions, strict=True)]
        return Evaluation(completions, scores, generated - start, time.perf_counter() - generated)


class HFEngine:
    """Greedy decoding with `model.generate`: left-padded batches of similar length, each with a KV cache of its own.

    `tokenizer` must pad, on the left. A batch stops when each of its rows has ended or `max_new_tokens` are made. Which
    prompts share a batch depends only on the prompts and on `batch_size`: greedy text can differ in the last bits of the
    logits when the batch split, the thread count or the GPU changes, so runs that shall agree must fix them.
    """

    def __init__(self, model, tokenizer, max_new_tokens: int, batch_size: int):
        from transformers import GenerationConfig

        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad token, which batches need: set tokenizer.pad_token (eos_token serves) and save it")
        if tokenizer.padding_side != "left":
            raise ValueError('the tokenizer pads on the right, before the answer: load it with padding_side="left"')
        eos = model.generation_config.eos_token_id
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        # Every option that changes greedy text is set here: what is left open, generate() takes from the checkpoint, and
        # e.g. Qwen2.5-Instruct ships a repetition penalty.
        self.config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            temperature=1.0,
            top_k=50,
            top_p=1.0,
            use_cache=True,
            eos_token_id=eos if eos is not None else tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    def encode(self, prompts: Sequence[str]) -> list[tuple[list[int], dict[str, torch.Tensor]]]:
        """Batches as (positions in `prompts`, inputs i64 [rows, longest prompt]), longest prompts first, so that the batch
        that needs most memory runs first."""
        lengths = [len(ids) for ids in self.tokenizer(list(prompts))["input_ids"]]
        order = sorted(range(len(prompts)), key=lambda i: (-lengths[i], i))
        batches = []
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            inputs = self.tokenizer([prompts[i] for i in rows], padding=True, return_tensors="pt").to(self.model.device)
            batches.append((rows, {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}))
        return batches

    def generate(self, encoded: list[tuple[list[int], dict[str, torch.Tensor]]]) -> list[str]:
        completions = [""] * sum(len(rows) for rows, _ in encoded)
        for rows, inputs in encoded:
            ids = self.model.generate(**inputs, generation_config=self.config)
            answers = ids[:, inputs["input_ids"].shape[1] :]
            for row, text in zip(rows, self.tokenizer.batch_decode(answers, skip_special_tokens=True)):
                completions[row] = text
        return completions
