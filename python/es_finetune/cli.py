"""`es-finetune COMMAND [flags]`. Exit code 2 and one line on stderr for what cannot run; 1 for a run that broke off."""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from es_finetune.errors import FINETUNE, RewardFailed, UserError, did_you_mean, require

_NOTHING = {"master": "none", "report_to": "none"}  # where null or [] in a YAML file does not mean: as if left out
_OF_MODELS = (".json", ".safetensors", ".jinja", ".md", ".txt", ".model")
CONFIGS = Path(__file__).parent / "configs"

USAGE = """usage: es-finetune COMMAND [flags]

  train [FILE.yaml]   fine-tune a model by evolution strategies; without flags, a one-minute demo on an embedded model.
                      FILE.yaml holds flags; the experiments of the paper come with the package, as countdown-qwen2.5-1.5b
  eval                accuracy of a model, or of a run's base or tuned weights, on a task's held-out questions
  calibrate           find a sigma for a model and a task from a few members
  replay RUN          make the tuned weights again from base model and log, and prove it by fingerprint
  export RUN          write the tuned model, made again from the log, for transformers and vLLM
  report RUN          one HTML page with the plots and sample answers of a run

`es-finetune COMMAND --help` lists the flags."""


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    commands: dict[str, Callable[[list[str]], None]] = {
        "train": _train,
        "eval": _eval,
        "calibrate": _calibrate,
        "replay": _replay,
        "export": _export,
        "report": _report,
    }
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if not arguments:
        print(f"error: no command given\n{USAGE}", file=sys.stderr)
        return 2
    try:
        if arguments[0] not in commands:
            raise UserError(
                "unknown command "
                f"{arguments[0]!r}{did_you_mean(arguments[0], commands) or '; the commands are ' + ', '.join(commands)}"
            )
        require(f"es-finetune {arguments[0]}", "finetune", *FINETUNE)
        commands[arguments[0]](arguments[1:])
    except (ValueError, OSError, RewardFailed) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    except _BrokenOff as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


class _BrokenOff(Exception):
    """A run that had begun ended before its end."""


def _train(arguments: list[str]) -> None:
    from es_finetune.config import TrainConfig, recorded_options
    from es_finetune.runs.log import read_log

    if arguments and not arguments[0].startswith("-"):
        arguments = _flags_of(_read_yaml(arguments[0]), TrainConfig) + arguments[1:]
    if _flag(arguments, "resume", "false").lower() in ("true", "yes", "y", "t", "1"):
        # The log's config, and over it what was given now: Trainer refuses what would make it another run.
        folder = _flag(arguments, "output")
        if folder is None:
            raise UserError("--resume continues the run in a folder: give it with --output")
        arguments = _flags_of(read_log(Path(folder) / "run.log")[0]["config"], TrainConfig) + arguments
    config = _parse(TrainConfig, arguments, "train")
    from huggingface_hub.utils import disable_progress_bars

    from es_finetune.monitor.progress import value
    from es_finetune.trainer import Trainer, follow
    from es_finetune.workers import torchrun
    from es_finetune.workers.protocol import WorkersDiffer

    if not torchrun.is_first_rank():
        disable_progress_bars()  # the first rank shows what is downloaded
        try:
            return follow(config)
        except (RewardFailed, WorkersDiffer) as error:
            raise _BrokenOff(_one_line(error)) from error
    trainer = Trainer(config)
    try:
        summary = trainer.train()
    except (Exception, KeyboardInterrupt) as error:
        if not isinstance(error, (OSError, RewardFailed, WorkersDiffer, KeyboardInterrupt)):
            traceback.print_exc()  # nobody foresaw it
        words = "stopped" if isinstance(error, KeyboardInterrupt) else _one_line(error)
        if isinstance(error, RewardFailed) and not (trainer.generation or trainer.members):
            raise _BrokenOff(
                f"{words}. Nothing is kept yet: mend the reward, and begin again with --overwrite"
            ) from error
        members = f" and {_counted(trainer.members, 'member')}" if trainer.members else ""
        kept = f"{_counted(trainer.generation, 'generation')}{members} are kept in {config.output}"
        begun = read_log(Path(config.output) / "run.log")[0]["config"]
        changed = _flags_of(
            {name: value for name, value in recorded_options(trainer.config).items() if value != begun[name]},
            TrainConfig,
        )
        command = shlex.join(["es-finetune", "train", "--resume", "--output", config.output, *changed])
        how = "the same torchrun, and --resume" if torchrun.under_torchrun() else command
        raise _BrokenOff(f"{words}. {kept}; continue with: {how}") from error
    base, final = (value(summary["metric"], summary[when]) for when in ("base", "final"))
    print(
        f"held-out {summary['metric']} {base} -> {final} in {summary['generations']} generations and "
        f"{summary['seconds_total']:.1f} s "
        f"({summary['share_outside'] or 0:.1%} outside generation and reward); theta {summary['fingerprint']}; "
        f"{config.output}"
    )


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _eval(arguments: list[str]) -> None:
    from es_finetune.commands.evaluate import assess
    from es_finetune.config import EvalConfig
    from es_finetune.runs.log import read_log

    run = _flag(arguments, "run")
    if run is not None:
        asked = read_log(Path(run) / "run.log")[0]["config"]
        names = set(EvalConfig.__dataclass_fields__) - {"output", "seed", "device"}
        arguments = _flags_of({name: value for name, value in asked.items() if name in names}, EvalConfig) + arguments
    print(json.dumps(assess(_parse(EvalConfig, arguments, "eval")), indent=2))


def _calibrate(arguments: list[str]) -> None:
    from es_finetune.commands.calibrate import calibrate
    from es_finetune.config import CalibrateConfig

    if arguments and not arguments[0].startswith("-"):
        known = {
            name: value
            for name, value in _read_yaml(arguments[0]).items()
            if name in CalibrateConfig.__dataclass_fields__
        }
        arguments = _flags_of(known, CalibrateConfig) + arguments[1:]
    calibrate(_parse(CalibrateConfig, arguments, "calibrate"))


def _replay(arguments: list[str]) -> None:
    from es_finetune.config import ReplayConfig

    config = _parse(ReplayConfig, _run_first(arguments, "replay"), "replay")
    rebuilt = _rebuild(config)
    optimizer = rebuilt.optimizer
    print(
        f"{config.run}: {optimizer.generation} of {len(rebuilt.generations)} generations made again, each with the "
        "fingerprints of the log; "
        f"theta {optimizer.fingerprint('theta'):016x}, live {optimizer.fingerprint('live'):016x}"
    )


def _export(arguments: list[str]) -> None:
    from es_finetune.config import ExportConfig
    from es_finetune.models.save import save_model
    from es_finetune.runs.log import read_log

    config = _parse(ExportConfig, _run_first(arguments, "export"), "export")
    output = Path(config.output or Path(config.run) / "model")
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
    rebuilt = _rebuild(config)
    save_model(rebuilt.model, rebuilt.tokenizer, output, merge_lora=config.merge_lora)
    print(
        f"{output}: the model after {rebuilt.optimizer.generation} generations, live "
        f"{rebuilt.optimizer.fingerprint('live'):016x}"
    )


def _is_model(folder: Path) -> bool:
    """Whether the folder holds what `save_model` writes and nothing that it does not."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    weights = any(name.endswith(".safetensors") for name in names) and names & {"config.json", "adapter_config.json"}
    return bool(weights) and all((folder / name).is_file() and Path(name).suffix in _OF_MODELS for name in names)


def _rebuild(config):
    from es_finetune.monitor.progress import counting
    from es_finetune.runs.replay import rebuild

    with counting(f"replaying {config.run}") as count:
        return rebuild(
            config.run, model=config.model, device=config.device, generation=config.generation, on_generation=count
        )


def _report(arguments: list[str]) -> None:
    from es_finetune.config import ReportConfig
    from es_finetune.monitor.report import report

    print(report(Path(_parse(ReportConfig, _run_first(arguments, "report"), "report").run)))


# --- flags
# --------------------------------------------------------------------------------------------------------------


def _parse(kind: type, arguments: list[str], command: str) -> Any:
    from transformers import HfArgumentParser

    _hide_bars()
    first = {
        "train": " [FILE.yaml]",
        "calibrate": " [FILE.yaml]",
        "eval": " [--run RUN]",
        "replay": " RUN",
        "export": " RUN",
        "report": " RUN",
    }.get(command, "")
    usage = f"es-finetune {command}{first} [flags]"

    class Parser(HfArgumentParser):
        """Hands to argparse a field's help alone, not the rest of its metadata."""

        @staticmethod
        def _parse_dataclass_field(parser, field):
            field = copy.copy(field)
            field.metadata = {"help": field.metadata["help"]}
            HfArgumentParser._parse_dataclass_field(parser, field)

    parser = Parser(kind, usage=usage, description=kind.__doc__, formatter_class=_Help, allow_abbrev=False)
    parser.error = _refuse  # instead of the usage of fifty flags
    _, unknown = parser.parse_known_args(arguments)  # looked at before the config, which might miss what was misspelt
    if unknown:
        word = unknown[0]
        if not word.startswith("-"):
            raise UserError(f"{word!r} belongs to no flag; usage: {usage}")
        near = did_you_mean(word.lstrip("-").partition("=")[0], kind.__dataclass_fields__, prefix="--")
        raise UserError(f"unknown flag {word}{near or f'; es-finetune {command} --help lists them'}")
    (config,) = parser.parse_args_into_dataclasses(arguments)
    return config


def _hide_bars() -> None:
    """Those of transformers, "Loading weights" and "Writing model shards", a second each around our own. Not the hub's,
    of gigabytes that are being downloaded, unless they are hidden already; transformers hides both."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    hidden = are_progress_bars_disabled()
    disable_progress_bar()
    if not hidden:
        enable_progress_bars()


class _Help(argparse.HelpFormatter):
    """Names the default of a flag where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help + ("" if action.default in (None, [], argparse.SUPPRESS) else " (default: %(default)s)")


def _refuse(message: str) -> None:
    raise UserError(message)


def _run_first(arguments: list[str], command: str) -> list[str]:
    if arguments and not arguments[0].startswith("-"):
        return ["--run", *arguments]
    if not {"-h", "--help"} & {*arguments} and _flag(arguments, "run") is None:
        raise UserError(f"{command} needs the folder of a run: es-finetune {command} RUN")
    return arguments


def _flag(arguments: list[str], name: str, default: str | None = None) -> str | None:
    """The value of --name in `arguments`, before they are parsed; the last if there are several, "true" if it has
    none."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", nargs="?", const="true", default=default)
    return getattr(parser.parse_known_args(arguments)[0], name)


def _flags_of(values: dict[str, Any], kind: type) -> list[str]:
    """The flags that ask for `values`. Through flags, so that types and wrong names are checked in one place."""
    flags = []
    for name, value in values.items():
        if name not in kind.__dataclass_fields__:
            raise UserError(
                f"unknown option {name!r}{did_you_mean(name, kind.__dataclass_fields__) or '; --help lists them'}"
            )
        if value in (None, []):
            value = _NOTHING.get(name)
        if value is not None:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def _read_yaml(name: str) -> dict[str, Any]:
    """The options in a YAML file, or in one that comes with the package."""
    import yaml

    from es_finetune.tasks import NAMES

    path = Path(name)
    if not path.exists():
        path = CONFIGS / f"{name.removesuffix('.yaml')}.yaml"
    if not path.exists():
        ready = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
        flag = f"--task {name}" if name in NAMES else f"--{name}" if "=" in name else ""
        meant = f": did you mean {flag}?" if flag else did_you_mean(name, ready) or f"; ready are {', '.join(ready)}"
        raise UserError(f"there is no file {name}, and no ready config of that name{meant}")
    if path.is_dir():
        raise UserError(
            f"{path} is a folder, and a file with options was expected; a run is continued with --resume --output "
            f"{path}"
        )
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no options: it must be lines of NAME: VALUE")
    return values


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
