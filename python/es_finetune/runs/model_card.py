"""The model card of a tuned model: what it was made from, and how to make it again. It names no local folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from es_finetune.runs.files import write_atomically
from es_finetune.runs.log import Generation

PAPER = "[arXiv:2509.24372](https://arxiv.org/abs/2509.24372)"


def write_model_card(
    folder: Path, header: dict[str, Any], generations: Sequence[Generation], *, merged: bool = False
) -> None:
    """Write README.md beside a model, in place of the empty form that PEFT leaves beside an adapter.

    Args:
        folder: Of the model, written.
        header: Of the run's log.
        generations: Of the log, those whose updates are in the weights.
        merged: Whether an adapter was added into the weights.

    Raises:
        OSError: It could not be written.
    """
    adapter = (folder / "adapter_config.json").exists()
    write_atomically(folder / "README.md", _card(header, generations, adapter, merged))


def _card(header: dict[str, Any], generations: Sequence[Generation], adapter: bool, merged: bool) -> str:
    config, identity, done = header["config"], header["model"], len(generations)
    on_hub = identity.get("commit") is not None
    model = identity["model"]
    base = identity.get("base_model", model)  # an adapter's
    base = base if on_hub else Path(base).name
    start = f"`{base}`" + (f", commit {identity['commit']}" if on_hub else "")
    if "base_model" in identity:
        start += f", with the adapter `{Path(model).name}`"
    metadata = {
        "library_name": "peft" if adapter else "transformers",
        **({"base_model": base} if on_hub and "file" not in identity else {}),  # a hub's name, without a GGUF file's
        "tags": ["evolution-strategies", *(["lora"] if adapter else [])],
    }
    proof = generations[-1].to_json() if generations else header
    reward = f"`{Path(config['reward']).name}`" if config["reward"] else "the task's"
    rank = config.get("noise_rank", 0)  # an older log has none
    rows = {
        "task": f"{config['task']}, reward: {reward}",
        "base model": start,
        "generations": str(done),
        "population": f"{config['population']}" + (", antithetic" if config["antithetic"] else ""),
        "noise": f"version {header['noise_version']}, " + (f"rank {rank}" if rank else "full rank"),
        "sigma": _course([g.sigma[0] for g in generations] or [config["sigma"]])
        + (f"; `{' '.join(config['sigma_for'])}`" if config["sigma_for"] else ""),
        "lr": _course([g.lr[0] for g in generations] or [config["lr"]]),
        "seed": str(config["seed"]),
        "fingerprint of the base model": f"`{header['base_fingerprint']}`",
        "fingerprint of the exact weights": f"`{proof['theta']}`",
        "fingerprint of the tuned weights here" + (", before they were merged" if merged else ""): f"`{proof['live']}`",
    }
    front = "".join(f"{key}: {json.dumps(value)}\n" for key, value in metadata.items())
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    merge = " --merge_lora" if merged else ""
    return f"""\
---
{front}---

# {Path(base).name}, tuned on {config["task"]}

Tuned by evolution strategies ({PAPER}): by forward passes alone, without gradients.
Made by es-kernels {header["es_finetune"]}.

|  |  |
| --- | --- |
{table}
## Make it again

The base model and the run's `run.log` give these weights again, to the bit, on any device.
RUN is the folder of the log:

```bash
es-finetune replay RUN --generation {done}    # proves every fingerprint
es-finetune export RUN --generation {done}{merge} --output FOLDER    # writes this folder
```
"""


def _course(values: Sequence[float]) -> str:
    return f"{values[0]:g}" + (f" to {values[-1]:g}" if values[-1] != values[0] else "")
