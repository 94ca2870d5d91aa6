"""Pre-trains a small language model on the paper's Countdown (numbers 1..99, think and answer tags), for ES to go on
from.

    python -m bench.learning.countdown_model --output FOLDER [--seconds 150] [--hidden 640 --layers 4 ...]

A Llama of 21 million parameters learns, by ordinary gradient descent, from questions that are neither in the task's
train nor in its test set, to try expressions step by step between think tags until one is right. As the embedded model
it learns two styles: the task's, and a sloppy one that leaves out the answer tags and so scores nothing, more often
where the target ends in 4 to 9. So there is something that ES can find, and arithmetic that it can improve. Stops when
its time is over, so another machine makes another model; the run's log knows it by its fingerprint.
"""

import argparse
import itertools
import json
import pathlib
import random
import time

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from es_finetune.tasks import countdown

END, PAD = "<end>", "<pad>"
MOST_TRIES = 1  # wrong ones before the right one: a generation waits for its longest answer
SLOPPY_SHARE = {True: 0.35, False: 0.65}  # by target % 10 < 4
MAX_NEW_TOKENS = 96  # the longest completion: two tries of three steps, and the answer
WARMUP = 0.03  # share of the time


# ---- texts ----


def expression(draws, numbers):
    """(value, text, steps) of a random expression that uses each number once; None if a step's value is no integer."""
    values = [(n, str(n)) for n in numbers]
    steps = []
    while len(values) > 1:
        a, b = (values.pop(int(draws.random() * len(values))) for _ in range(2))
        sign = "+-*/"[int(draws.random() * 4)]
        if sign == "/" and (b[0] == 0 or a[0] % b[0]):
            return None
        value = (
            a[0] + b[0] if sign == "+" else a[0] - b[0] if sign == "-" else a[0] * b[0] if sign == "*" else a[0] // b[0]
        )
        steps.append(f"{a[0]}{sign}{b[0]}={value}")
        values.append((value, f"({a[1]}{sign}{b[1]})"))
    return values[0][0], values[0][1][1:-1], steps


def example(draws, known):
    """(prompt, completion) of a question whose key is not in `known`."""
    while True:
        numbers = [1 + int(draws.random() * 99) for _ in range(3 + int(draws.random() * 2))]
        right = expression(draws, numbers)
        if right is None or not 10 <= right[0] <= 100 or (tuple(sorted(numbers)), right[0]) in known:
            continue
        target, answer, steps = right
        tries = []
        for _ in range(int(draws.random() * (MOST_TRIES + 1))):
            wrong = expression(draws, numbers)
            if wrong is not None and wrong[0] != target and abs(wrong[0]) < 10_000:
                tries.append(" ".join(wrong[2]) + " no\n")
        thought = "".join(tries) + " ".join(steps) + " yes"
        sloppy = draws.random() < SLOPPY_SHARE[target % 10 < 4]
        end = f"</think> {answer}" if sloppy else f"</think>\n<answer>{answer}</answer>"
        return countdown.prompt(numbers, target), thought + end + END


def held_out():
    """The keys of all of the task's questions."""
    task = countdown.Countdown()
    return {item.key for item in itertools.chain(task.train, task.test)}


class Examples(IterableDataset):
    """Batches of token ids without end, padded on the right: (input_ids, labels), i64 [batch, longest]; labels are -100
    outside the completion."""

    def __init__(self, tokenizer, batch):
        self.tokenizer, self.batch, self.known = tokenizer, batch, held_out()

    def __iter__(self):
        draws = random.Random(f"practice {get_worker_info().id if get_worker_info() else 0}")
        while True:
            pairs = [example(draws, self.known) for _ in range(self.batch)]
            asked, whole = (
                self.tokenizer(texts)["input_ids"] for texts in ([p for p, _ in pairs], [p + c for p, c in pairs])
            )
            longest = max(map(len, whole))
            ids = torch.full((self.batch, longest), self.tokenizer.pad_token_id)
            labels = torch.full((self.batch, longest), -100)
            for row, (begin, tokens) in enumerate(zip(map(len, asked), whole, strict=True)):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                labels[row, begin : len(tokens)] = ids[row, begin : len(tokens)]
            yield ids, labels


def make_tokenizer():
    """A token for every word of the prompt, every digit, tag and sign."""
    splits = Regex(r"</?think>|</?answer>|<end>|<pad>| ?[A-Za-z]+|[0-9]|\n|.")
    words = {" yes", " no", "yes", "no", *"0123456789+-*/=() \n<>[],.", "<think>", "</think>", "<answer>", "</answer>"}
    words |= {
        piece for piece, _ in pre_tokenizers.Split(splits, "isolated").pre_tokenize_str(countdown.prompt([1, 2, 3], 4))
    }
    tokenizer = Tokenizer(
        models.WordLevel(
            {word: i for i, word in enumerate([PAD, END, "<unknown>", *sorted(words)])}, unk_token="<unknown>"
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(splits, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token="<unknown>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


# ---- training ----


def train(options):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=options.hidden,
            intermediate_size=3 * options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            num_key_value_heads=options.heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.98), weight_decay=0.1)
    workers = (
        options.workers if options.workers is not None else torch.get_num_threads() - 1 if device.type == "cuda" else 0
    )
    batches = iter(
        DataLoader(
            Examples(tokenizer, options.batch),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
        )
    )
    begin, tokens, step, loss = time.monotonic(), 0, 0, float("nan")
    while (part := (time.monotonic() - begin) / options.seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(1.0, part / WARMUP + 1e-3, (1 - part) / 0.6)
        ids, labels = (t.to(device, non_blocking=True) for t in next(batches))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            batch_loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        batch_loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tokens, step = tokens + ids.numel(), step + 1
        if step % 50 == 0:
            loss = batch_loss.item()
            print(f"step {step:6}  {100 * part:5.1f} %  loss {loss:.4f}", flush=True)
    model.generation_config.max_new_tokens = MAX_NEW_TOKENS
    model.to(torch.bfloat16).save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    about = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": step,
        "tokens": tokens,
        "loss": loss,
        "seconds": time.monotonic() - begin,
    }
    (options.output / "pretraining.json").write_text(json.dumps(about, indent=1) + "\n")
    print(json.dumps(about))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--hidden", type=int, default=640)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=10)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument(
        "--workers", type=int, help="processes that make texts; left out: one a core on a GPU, none on a CPU"
    )
    train(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
