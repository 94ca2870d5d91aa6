"""`es-finetune eval`: how good a model is on a task, base, tuned or any checkpoint, by the protocol of the paper."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from es_finetune.commands import takes_options_of
from es_finetune.commands.replay import rebuild_run
from es_finetune.config import EvalConfig, model_options
from es_finetune.engines import Sampling
from es_finetune.errors import UserError
from es_finetune.evaluation.evaluator import measure, rewards_of
from es_finetune.evaluation.statistics import kl_to_base
from es_finetune.models.load import load_model, pick_device
from es_finetune.runs.files import save_answers, write_atomically
from es_finetune.runs.log import read_log
from es_finetune.runs.setup import given_task, make_engine, make_task
from es_finetune.tasks import Data, Reward


def _options_of_run(options: dict[str, Any]) -> dict[str, Any]:
    """With a run, its options where no others are given."""
    if options.get("run") is None:
        return options
    logged = read_log(Path(options["run"]) / "run.log")[0]["config"]
    names = EvalConfig.__dataclass_fields__.keys() - {"output", "seed", "samples", "device"}
    run = {name: value for name, value in logged.items() if name in names}
    return run | {name: value for name, value in options.items() if value is not None}


@takes_options_of(EvalConfig, complete=_options_of_run)
def evaluate(
    config: EvalConfig, *, data: Data | None = None, test_data: Data | None = None, reward: Reward | None = None
) -> dict[str, Any]:
    """Measure the accuracy of a model on a task's held-out questions, by the protocol of the paper.

    With `run` the weights are made again from the run's log, and model, task and settings are those of the run.

        es_finetune.evaluate(model="Qwen/Qwen2.5-1.5B-Instruct", task="countdown", samples=1)
        es_finetune.evaluate(run="runs/countdown", generation=100)

    Args:
        **options: The flags of `es-finetune eval`, which are the fields of `EvalConfig`. With task "custom", or the run
            of one, `data`, `test_data` and `reward` may be objects as for `Trainer`.

    Returns:
        What the file result.json holds, and "answers", the path of answers.jsonl beside it: "metric" ("exact" or
        "reward"), its mean "value" over the questions and its "interval_95"; the means "reward", "exact" and "format";
        "failed" scores; "questions", "samples", "tokens", "seconds_generate", "seconds_score"; with `kl` the divergence
        "kl" in nats a token, its "kl_standard_error" and the "kl_tokens" that it is estimated from.

    Raises:
        UserError: Something asked for cannot be had. Always before long work.
        OSError: The files cannot be written.
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
    task = given_task(config, data=data, test_data=test_data, reward=reward) or make_task(config)
    items = list(getattr(task, config.split))[: config.items or None]
    device = pick_device(config.device)
    if config.run is not None:
        rebuilt = rebuild_run(config.run, model=config.model, device=config.device, generation=generation)
        model, tokenizer = rebuilt.model, rebuilt.tokenizer
        del rebuilt  # and with it the exact weights, which only updates need
    else:
        model, tokenizer, _ = load_model(config.model, device=device, **model_options(config))
    samples = config.samples or task.eval_samples
    # The divergence is estimated from answers that the model itself drew.
    sampling = Sampling(1.0, config.seed) if samples > 1 or config.kl else None
    engine = make_engine(config, task, model, tokenizer)
    measured = measure(engine, task, items, samples, sampling)
    rewards = rewards_of(task, measured.evaluation.scores)
    result = {
        "task": task.name,
        "model": config.model,
        "run": config.run,
        "generation": generation,
        "split": config.split,
        "questions": len(items),
        "samples": samples,
        "decoding": "greedy" if sampling is None else f"temperature {sampling.temperature}, seed {config.seed}",
        "metric": measured.metric,
        "value": measured.value,
        "interval_95": [measured.low, measured.high],
        "reward": math.fsum(rewards) / len(rewards),
        "exact": measured.evaluation.mean("exact"),
        "format": measured.evaluation.mean("format"),
        "failed": measured.evaluation.failed,
        "tokens": measured.evaluation.tokens,
        "seconds_generate": measured.evaluation.seconds_generate,
        "seconds_score": measured.evaluation.seconds_score,
    }
    if config.kl:
        prompts, answers = [item.prompt for item in measured.items], measured.evaluation.answers
        tuned = engine.log_probs(engine.encode_answers(prompts, answers))
        base, base_tokenizer, _ = load_model(config.kl_model or config.model, device=device, **model_options(config))
        engine = make_engine(config, task, base, base_tokenizer)
        kl = kl_to_base(answers, tuned, engine.log_probs(engine.encode_answers(prompts, answers)))
        result |= {"kl": kl.value, "kl_standard_error": kl.standard_error, "kl_tokens": kl.tokens}
    output.mkdir(parents=True, exist_ok=True)
    save_answers(output / "answers.jsonl", measured.items, measured.evaluation.answers, measured.evaluation.scores)
    write_atomically(output / "result.json", json.dumps(result, indent=2) + "\n")
    return {**result, "answers": str(output / "answers.jsonl")}


def _folder(config: EvalConfig, generation: int | None) -> str:
    if config.run is not None:
        return str(Path(config.run) / f"eval-{generation}")
    return str(Path("runs") / f"eval-{config.label}")
