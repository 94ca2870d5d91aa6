"""What else a user could do with the model, the questions and the minutes of demo-llm: TRL's GRPO and SFT, with AdamW.

    make bench-trl        in an environment of its own; or, there:
    python -m bench.learning.short_answers_trl [--seconds 360] [--seeds 3] [--methods ...] [--f32] [--json FILE]

GRPO samples answers of 12 tokens; its reward is 1 for the reference answer, less the distance of the lengths in units
of 50 characters (the paper's conciseness, so that answers that are all wrong differ). SFT reads the reference answers,
as demo-llm's ES does. All else is TRL's and PEFT's default but for a constant lr and what METHODS says. Every run has
one CPU thread; evals on the held-out questions do not count to its seconds. A run whose row is in --work is not made
again. TRL computes in bf16 by default. Where the processor has no instructions for it, a step takes many times as long:
give --f32 there.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import pathlib
import re
import resource
import tempfile
import time

import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig

from bench import RESULTS, ROOT
from bench.common import environment, smollm2
from es_finetune.engines.hf import HFEngine
from es_finetune.evaluation.evaluator import Evaluator
from es_finetune.runs.files import write_atomically
from es_finetune.tasks.short_answers import ShortAnswers

GRPO = (trl.GRPOTrainer, functools.partial(trl.GRPOConfig, max_completion_length=ShortAnswers.max_new_tokens))
SFT = (trl.SFTTrainer, trl.SFTConfig)
METHODS = {
    "GRPO, LoRA, lr 1e-6 (default)": (*GRPO, True, {}),
    "GRPO, LoRA, lr 1e-4": (*GRPO, True, {"learning_rate": 1e-4}),
    "GRPO, all weights, lr 1e-5": (*GRPO, False, {"learning_rate": 1e-5}),
    "SFT, LoRA, lr 2e-4": (*SFT, True, {"learning_rate": 2e-4}),
}
EVALS = 8


def examples(task, trainer):
    """The training questions as TRL reads them."""
    prompts = [{"prompt": list(item.prompt)} for item in task.train]
    if trainer is trl.GRPOTrainer:
        return Dataset.from_list([row | {"key": item.key} for row, item in zip(prompts, task.train, strict=True)])
    answers = [{"completion": [{"role": "assistant", "content": item.data}]} for item in task.train]
    return Dataset.from_list([row | answer for row, answer in zip(prompts, answers, strict=True)])


def rewards(task):
    """What GRPO's answers are worth: TRL adds the two."""
    items = {item.key: item for item in task.train}

    def exact(completions, key, **_):
        return [task.score(items[k], c[0]["content"]).reward for k, c in zip(key, completions, strict=True)]

    def length(completions, key, **_):
        return [-abs(len(c[0]["content"]) - len(items[k].data)) / 50 for k, c in zip(key, completions, strict=True)]

    return [exact, length]


class Clock(transformers.TrainerCallback):
    """Evaluates EVALS times in so many seconds of training, and ends it then."""

    def __init__(self, engine, task, seconds):
        self.model, self.held_out, self.seconds = engine.model, Evaluator(engine, task, task.test), seconds
        self.curve, self.rewards, self.evaluating = [], [], 0.0

    def on_train_begin(self, args, state, control, **_):
        self.begin = time.monotonic()
        self.evaluate(0.0, 0)

    def on_step_end(self, args, state, control, **_):
        spent = self.spent()
        if spent >= self.seconds * len(self.curve) / EVALS:
            self.evaluate(spent, state.global_step)
        control.should_training_stop = spent >= self.seconds

    def on_log(self, args, state, control, logs, **_):
        if "reward" in logs:
            self.rewards.append([self.spent(), state.global_step, logs["reward"]])

    def spent(self):
        return time.monotonic() - self.begin - self.evaluating

    def evaluate(self, spent, step):
        started = time.monotonic()
        training = self.model.training
        self.model.eval()
        result = self.held_out()
        self.model.train(training)
        self.curve.append([spent, step, result.mean("exact"), result.mean("format")])
        self.evaluating += time.monotonic() - started


def run(job):
    """One run, in a process of its own, whose memory is counted."""
    method, seed, seconds, f32 = job
    torch.set_num_threads(1)
    trainer_class, make_config, lora, options = METHODS[method]
    task = ShortAnswers()
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2.FOLDER, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2.FOLDER)
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(
            output_dir=folder,
            seed=seed,
            use_cpu=True,
            **({"bf16": False} if f32 else {}),
            lr_scheduler_type="constant",
            num_train_epochs=10**4,
            save_strategy="no",
            report_to="none",
            logging_strategy="steps",
            logging_steps=1,
            disable_tqdm=True,
            **options,
        )
        trainer = trainer_class(
            model,
            args=config,
            train_dataset=examples(task, trainer_class),
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM") if lora else None,
            **({"reward_funcs": rewards(task)} if trainer_class is trl.GRPOTrainer else {}),
        )
        clock = Clock(HFEngine(trainer.model, tokenizer, task.max_new_tokens, len(task.test)), task, seconds)
        trainer.add_callback(clock)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return {
        "method": method,
        "seed": seed,
        "seconds": seconds,
        "lr": config.learning_rate,
        "batch": config.per_device_train_batch_size,
        "bf16": config.bf16,
        "curve": clock.curve,
        "rewards": clock.rewards,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=360, help="of training, each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--f32", action="store_true", help="compute in float32")
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "runs/short-answers-trl", help="runs done before")
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS / "short_answers_trl.json")
    args = parser.parse_args()
    smollm2.fetch()
    args.work.mkdir(parents=True, exist_ok=True)
    jobs = {
        (method, seed): args.work / f"{re.sub(r'[^-.a-z0-9]+', '-', method, flags=re.IGNORECASE)}-{seed}.json"
        for seed, method in itertools.product(range(args.seeds), args.methods)
    }
    todo = [(*job, args.seconds, args.f32) for job, path in jobs.items() if not path.exists()]
    with multiprocessing.get_context("spawn").Pool(args.processes, maxtasksperchild=1) as pool:
        for row in pool.imap_unordered(run, todo):
            write_atomically(jobs[row["method"], row["seed"]], json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    packages = {package.__name__: package.__version__ for package in (trl, transformers)}
    machine = environment.describe("cpu") | packages
    runs = [json.loads(path.read_text()) for path in sorted(args.work.glob("*.json"))]
    runs.sort(key=lambda run: (list(METHODS).index(run["method"]), run["seed"]))
    report = {"machine": machine, "model": smollm2.PACKAGE, "runs": runs}
    write_atomically(args.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
