"""`es-finetune eval`: how good a model is on a task, base, tuned or any checkpoint, by the protocol of the paper."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from es_finetune.config import EvalConfig, model_options
from es_finetune.errors import UserError
from es_finetune.evaluation.evaluator import measure, rewards_of
from es_finetune.evaluation.statistics import kl_to_base
from es_finetune.models.load import load_model, pick_device
from es_finetune.runs.files import save_answers, write_atomically
from es_finetune.runs.log import read_log
from es_finetune.runs.replay import rebuild
from es_finetune.runs.setup import make_engine, make_task


def assess(config: EvalConfig) -> dict[str, Any]:
    """Answer the questions, score them, and write answers.jsonl and result.json; returns what result.json holds.

    With config.run the weights are made again from the run's log. ValueError for what cannot be measured, before long
    work.
    """
    generation = None
    if config.run is not None:
        header, generations = read_log(Path(config.run) / "run.log")
        generation = len(generations) if config.generation is None else config.generation
        for name, value in model_options(config).items():
            if value != header["config"][name] and name != "attn_implementation":
                raise UserError(
                    f"with --run the model is the run's, whose {name} is {header['config'][name]!r}: leave out --{name}"
                )
    output = Path(config.output or _folder(config, generation))
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file: give a folder")
    task = make_task(config)
    items = list(getattr(task, config.split))[: config.items or None]
    device = pick_device(config.device)
    if config.run is not None:
        rebuilt = rebuild(config.run, model=config.model, device=config.device, generation=generation)
        model, tokenizer = rebuilt.model, rebuilt.tokenizer
        del rebuilt  # and with it the exact weights, which only updates need
    else:
        model, tokenizer, _ = load_model(config.model, device=device, **model_options(config))
    samples = config.samples or task.eval_samples
    # The divergence is estimated from answers that the model itself drew.
    temperature = 1.0 if samples > 1 or config.kl else 0.0
    here = make_engine(config, task, model, tokenizer, temperature=temperature, seed=config.seed)
    found = measure(here, task, items, samples)
    rewards = rewards_of(task, found.evaluation.scores)
    result = {
        "task": task.name,
        "model": config.model,
        "run": config.run,
        "generation": generation,
        "split": config.split,
        "questions": len(items),
        "samples": samples,
        "decoding": "greedy" if temperature == 0 else f"temperature {temperature}, seed {config.seed}",
        "metric": found.metric,
        "value": found.value,
        "interval_95": [found.low, found.high],
        "reward": math.fsum(rewards) / len(rewards),
        "exact": found.evaluation.mean("exact"),
        "format": found.evaluation.mean("format"),
        "failed": found.evaluation.failed,
        "tokens": found.evaluation.tokens,
        "seconds_generate": found.evaluation.seconds_generate,
        "seconds_score": found.evaluation.seconds_score,
    }
    if config.kl:
        prompts = [item.prompt for item in found.items]
        tuned = here.log_probs(prompts, found.evaluation.answers)
        base, base_tokenizer, _ = load_model(config.kl_model or config.model, device=device, **model_options(config))
        kl = kl_to_base(
            found.evaluation.answers,
            tuned,
            make_engine(config, task, base, base_tokenizer).log_probs(prompts, found.evaluation.answers),
        )
        result |= {"kl": kl.value, "kl_standard_error": kl.standard_error, "kl_tokens": kl.tokens}
    output.mkdir(parents=True, exist_ok=True)
    save_answers(output / "answers.jsonl", found.items, found.evaluation.answers, found.evaluation.scores)
    write_atomically(output / "result.json", json.dumps(result, indent=2) + "\n")
    return {**result, "answers": str(output / "answers.jsonl")}


def _folder(config: EvalConfig, generation: int | None) -> str:
    if config.run is not None:
        return str(Path(config.run) / f"eval-{generation}")
    return str(Path("runs") / f"eval-{config.label}")
