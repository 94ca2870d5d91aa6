"""`es-finetune export`: the tuned model of a run in a folder, as transformers and vLLM load it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from es_finetune.commands import takes_options_of
from es_finetune.commands.replay import rebuild_run
from es_finetune.config import ExportConfig
from es_finetune.errors import UserError
from es_finetune.models.checkpoint_names import is_peft
from es_finetune.models.save import save_model
from es_finetune.runs.log import read_log
from es_finetune.runs.model_card import write_model_card

_SUFFIXES_OF_MODELS = (".json", ".safetensors", ".jinja", ".md", ".txt", ".model")


class Exported(NamedTuple):
    """What `export` wrote."""

    folder: Path
    generation: int  # updates that the weights have had
    live: str  # fingerprint of the weights, 16 hexadecimal digits


@takes_options_of(ExportConfig)
def export(config: ExportConfig) -> Exported:
    """Write the tuned model of a run, made again from base model and log: safetensors, configs, tokenizer
    and a model card.

    The folder is whole or, as before the call, what it was.

    Args:
        run: Folder of the run.
        model: Where the base model is now; as in the log if None.
        generation: The weights after this many updates; all if None.
        device: On which the weights are made: "cpu", "cuda", "cuda:1", ...; "auto": cuda if there is one.
        output: Folder to write; RUN/model if None.
        merge_lora: Write the whole model with the adapter added in, instead of the adapter.
        overwrite: Replace the output folder, which must hold a model and nothing else.

    Returns:
        The `folder` written, the `generation` whose weights are in it, and their fingerprint `live`.

    Raises:
        UserError: The output folder may not be replaced, or what `replay` raises. Nothing was written.
        OSError: The model cannot be written, as on a full disk.
    """
    output = Path(config.output or Path(config.run) / "model")
    _check_output(output, config)
    rebuilt = rebuild_run(config.run, model=config.model, device=config.device, generation=config.generation)
    save_model(rebuilt.model, rebuilt.tokenizer, output, merge_lora=config.merge_lora)
    optimizer = rebuilt.optimizer
    updates = rebuilt.generations[: optimizer.generation]
    write_model_card(output, rebuilt.header, updates, merged=config.merge_lora and is_peft(rebuilt.model))
    return Exported(output, optimizer.generation, f"{optimizer.fingerprint('live'):016x}")


def _check_output(output: Path, config: ExportConfig) -> None:
    """UserError unless the folder is new, or an older model that is neither precious nor the base model."""
    if output.exists() and not config.overwrite:
        raise UserError(f"{output} is there already: give another --output, or --overwrite to replace it")
    if output.exists() and not _is_model(output):
        raise UserError(
            f"{output} is no folder of a model alone, which --overwrite could replace: give another --output"
        )
    base = config.model or read_log(Path(config.run) / "run.log")[0]["config"]["model"]
    if output.resolve() == Path(base).resolve():
        raise UserError(
            f"{output} is the base model, without which the run cannot be made again: give another --output"
        )


def _is_model(folder: Path) -> bool:
    """Whether the folder holds what `save_model` writes and nothing that it does not."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    weights = any(name.endswith(".safetensors") for name in names) and names & {"config.json", "adapter_config.json"}
    return bool(weights) and all(
        (folder / name).is_file() and Path(name).suffix in _SUFFIXES_OF_MODELS for name in names
    )
