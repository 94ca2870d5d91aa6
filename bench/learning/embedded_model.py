"""Trains the embedded model of `countdown-char` and writes it into es_finetune/models/embedded:

    python -m bench.learning.embedded_model [--output DIR]

A 108,000-parameter Llama learns by ordinary gradient descent, from questions that are not held out and answers of two
styles: the plain one, and one spoiled by a prefix ("hm,3+4+7") that the task's format refuses. Where the target ends in
0 to 3 the prefix stands before 35% of the answers, else before 65%, so greedy answers are spoiled for 6 targets in 10
and the model knows the arithmetic far better than they show. That gap is what the demo's ES run closes. Fixed seed, one
thread, about two minutes.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench import ROOT
from es_finetune.tasks.countdown_char import ALPHABET, CountdownChar, prompt, solutions

SPOIL = "hm,"
SPOILED_SHARE = {True: 0.35, False: 0.65}  # by target % 10 < 4
TARGETS = range(-100, 1000)  # wider than the task's 0..99: half as many questions again to learn arithmetic from
STEPS, BATCH, PEAK_LR, WARMUP = 2000, 128, 4e-3, 100


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; `^` begins, `$` ends, `_` pads on the left."""
    vocabulary = {character: i for i, character in enumerate("_^$?" + ALPHABET + "hm")}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="_",
        bos_token="^",
        eos_token="$",
        unk_token="?",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def practice() -> list[tuple[str, str, int]]:
    """(prompt, an answer with the numbers in the prompt's order, target) of every question that is not held out."""
    held_out = {item.key for item in CountdownChar().test}
    return [
        (prompt(answer, target), answer, target)
        for (numbers, target), answers in solutions(TARGETS).items()
        if (numbers, target) not in held_out
        for answer in answers
    ]


def make_batch(
    draws: random.Random, examples: list[tuple[str, str, int]], tokenizer
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids, attention_mask, labels, each i64 [BATCH, longest]; labels are -100 outside the answer."""
    texts, prompt_lengths = [], []
    for question, answer, target in draws.choices(examples, k=BATCH):
        spoiled = draws.random() < SPOILED_SHARE[target % 10 < 4]
        texts.append(question + SPOIL * spoiled + answer + tokenizer.eos_token)
        prompt_lengths.append(len(question))
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    answer_start = ids.shape[1] - mask.sum(1) + torch.tensor(prompt_lengths)
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < answer_start[:, None], -100)
    return ids, mask, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "python/es_finetune/models/embedded")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()

    torch.set_num_threads(1)  # with 2, a busy neighbour on one core makes every step wait for it
    torch.manual_seed(0)
    draws = random.Random(0)
    tokenizer = make_tokenizer()
    examples = practice()
    model = make_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(examples)} examples")

    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP, max(0.02, (1 - step / options.steps) / 0.6))
    )
    for step in range(options.steps):
        ids, mask, labels = make_batch(draws, examples, tokenizer)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == options.steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}", flush=True)

    model.generation_config.max_new_tokens = CountdownChar.max_new_tokens
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
