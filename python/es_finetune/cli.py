"""`es-finetune COMMAND [flags]`: from flags to the functions of es_finetune.commands, and from their results to lines.

Nothing heavy is imported before a command has been read: help, version and errors of the flags come at once.

Exit code 2 and one line on stderr for what cannot be done; 1 for a run that broke off, and for a bug of ours, with its
traceback.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib
import json
import logging
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from es_finetune.errors import FINETUNE, RunStopped, UserError, did_you_mean, in_one_line, is_foreseen, require

CONFIGS = Path(__file__).parent / "configs"
_NOTHING = {"master": "none", "report_to": "none"}  # where null or [] in a YAML file does not mean: as if left out
_BUG = "this is a bug of es_finetune: please report it, with the traceback above and what `es-finetune env` prints"
_TRUE, _FALSE = ("true", "yes", "y", "t", "1"), ("false", "no", "n", "f", "0")

Options = dict[str, Any]


class _Command(NamedTuple):
    summary: str
    run: Callable[[Options], None]
    config: str | None = None  # the dataclass in config.py whose fields are its flags
    usage: str = "[flags]"
    takes_config: bool = False  # --config FILE
    loads_model: bool = True
    prints_json: bool = False  # for another program to read: messages go to standard error


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    try:
        options = _parse(arguments)
        command = COMMANDS[options.pop("command")]
        quiet = options.pop("quiet", False)
        options.pop("debug", None)
        if command.loads_model:
            _hide_bars(quiet)
        if command.config:
            from es_finetune.monitor.progress import show_messages, terminal

            level = logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO
            with show_messages(terminal(stderr=command.prints_json), level):
                command.run(options)
        else:
            command.run(options)
    except Exception as error:
        return _refuse(error, debug)
    return 0


def _refuse(error: Exception, debug: bool) -> int:
    """Say on stderr what is wrong; returns the exit code."""
    cause = error.__cause__ if isinstance(error, RunStopped) and error.__cause__ is not None else error
    foreseen = is_foreseen(cause)
    if debug or not foreseen:
        traceback.print_exception(type(cause), cause, cause.__traceback__)
    if not foreseen:
        print(_BUG, file=sys.stderr)
    if foreseen or cause is not error:
        print(f"error: {in_one_line(error)}", file=sys.stderr)
    return 2 if foreseen and not isinstance(error, RunStopped) else 1


# --- the commands -----------------------------------------------------------------------------------------------------


def _train(options: Options) -> None:
    from es_finetune.commands.train import train
    from es_finetune.monitor.progress import Progress, say, terminal, value

    quiet = not logging.getLogger("es_finetune").isEnabledFor(logging.INFO)
    trained = train(options, callbacks=[] if quiet else [Progress()])
    if trained is None:  # a rank for which the first one speaks
        return
    folder, summary = trained
    base, final = (value(summary["metric"], summary[when]) for when in ("base", "final"))
    say(
        f"held-out {summary['metric']} {base} -> {final} in {summary['generations']} generations and "
        f"{summary['seconds_total']:.1f} s ({summary['share_outside'] or 0:.1%} outside of answering and scoring); "
        f"theta {summary['fingerprint']}; {folder}",
        terminal(),
    )


def _eval(options: Options) -> None:
    from es_finetune.commands.evaluate import evaluate

    print(json.dumps(evaluate(**options), indent=2))


def _calibrate(options: Options) -> None:
    from es_finetune.commands.calibrate import calibrate
    from es_finetune.monitor.progress import say, terminal

    result = calibrate(**options)
    sigma = "" if result["sigma"] is None else f"sigma {result['sigma']:g}, lr {result['lr']:g}: "
    say(f"{sigma}{result['reason']}", terminal())


def _replay(options: Options) -> None:
    from es_finetune.commands.replay import replay
    from es_finetune.monitor.progress import say, terminal

    rebuilt = replay(**options)
    optimizer = rebuilt.optimizer
    say(
        f"{options['run']}: {optimizer.generation} of {len(rebuilt.generations)} generations made again, each with the "
        f"fingerprints of the log; theta {optimizer.fingerprint('theta'):016x}, "
        f"live {optimizer.fingerprint('live'):016x}",
        terminal(),
    )


def _export(options: Options) -> None:
    from es_finetune.commands.export import export
    from es_finetune.monitor.progress import say, terminal

    exported = export(**options)
    say(f"{exported.folder}: the model after {exported.generation} generations, live {exported.live}", terminal())


def _report(options: Options) -> None:
    from es_finetune.commands.report import report

    print(report(**options))


def _env(options: Options) -> None:
    from es_finetune.commands.env import environment

    facts = environment()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value}")


def _configs(options: Options) -> None:
    if "name" in options:
        print(_config_file(options["name"]).read_text(encoding="utf-8"), end="")
        return
    for path in sorted(CONFIGS.glob("*.yaml")):
        values = _read_config(str(path))
        print(f"{path.stem:26}  {values['task']:26}  {values['model']}")


COMMANDS = {
    "train": _Command(
        "fine-tune a model by evolution strategies; without flags, a one-minute demo on an embedded model",
        _train,
        "TrainConfig",
        takes_config=True,
    ),
    "eval": _Command(
        "accuracy of a model, or of a run's base or tuned weights, on a task's held-out questions",
        _eval,
        "EvalConfig",
        "[--run RUN] [flags]",
        prints_json=True,
    ),
    "calibrate": _Command(
        "find a sigma for a model and a task from a few members", _calibrate, "CalibrateConfig", takes_config=True
    ),
    "replay": _Command(
        "make the tuned weights again from base model and log, and prove it by fingerprint",
        _replay,
        "ReplayConfig",
        "RUN [flags]",
    ),
    "export": _Command(
        "write the tuned model, made again from the log, for transformers and vLLM",
        _export,
        "ExportConfig",
        "RUN [flags]",
    ),
    "report": _Command(
        "one HTML page with the plots and sample answers of a run",
        _report,
        "ReportConfig",
        "RUN [flags]",
        loads_model=False,
    ),
    "configs": _Command(
        "list the experiments of the paper and of demo-llm, which --config takes by name, or print one",
        _configs,
        usage="[NAME] [flags]",
        loads_model=False,
    ),
    "env": _Command("what an issue report needs: versions, devices, backends", _env, loads_model=False),
}


# --- flags ------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage of fifty flags and exit."""

    def error(self, message: str) -> Any:
        raise UserError(message)

    def refuse_flag(self, word: str) -> None:
        known = (_underscored(string.lstrip("-")) for string in self._option_string_actions)
        near = did_you_mean(word.lstrip("-").partition("=")[0], dict.fromkeys(known), "--")
        raise UserError(f"unknown flag {word}{near or f'; {self.prog} --help lists them'}")


class _CommandParser(_Parser):
    """Reads config.py for its flags when it is asked for them, and says what was meant by an unknown one."""

    def __init__(self, *, command: str, **options: Any):
        self.command, self.spec = command, COMMANDS[command]
        usage = f"es-finetune {command} {self.spec.usage}"
        super().__init__(usage=usage, formatter_class=_Help, allow_abbrev=False, **options)
        self._is_filled = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if not self._is_filled:
            self._is_filled = True
            self._fill()
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self._refuse_unknown(unknown[0])
        return namespace, unknown

    def error(self, message: str) -> Any:
        if message.startswith("the following arguments are required"):
            message = f"{self.command} needs the folder of a run: es-finetune {self.command} RUN"
        raise UserError(message)

    def _fill(self) -> None:
        self.description = self.spec.summary[0].upper() + self.spec.summary[1:] + "."
        if self.command == "configs":
            self.add_argument("name", nargs="?", metavar="NAME", default=argparse.SUPPRESS, help="of one to print")
        if self.spec.takes_config:
            self.add_argument(
                "--config",
                metavar="FILE",
                default=argparse.SUPPRESS,
                help="YAML file of flags, or the name of one that `es-finetune configs` lists; flags beside it count",
            )
        _add_common_flags(self)
        if self.spec.config:
            _add_flags(self, getattr(importlib.import_module("es_finetune.config"), self.spec.config))

    def _refuse_unknown(self, word: str) -> None:
        if word.startswith("-"):
            self.refuse_flag(word)
        if self.spec.takes_config and (Path(word).is_file() or _ready(word).exists()):
            raise UserError(f"{word!r} belongs to no flag: did you mean --config {word}?")
        raise UserError(f"{word!r} belongs to no flag; usage: {self.usage}")


class _Help(argparse.HelpFormatter):
    """Shows of each flag one spelling: --test-data is understood too."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30)

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            self._action_max_length += self._indent_increment  # of the commands, which argparse forgets

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)  # which names of flags and tasks have

    def _format_action_invocation(self, action: argparse.Action) -> str:
        action = copy.copy(action)
        strings = dict.fromkeys(s for s in action.option_strings if s == f"--{_underscored(s[2:])}" or s == "-h")
        action.option_strings = list(strings)
        return super()._format_action_invocation(action)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib import metadata  # not es_kernels, which loads torch

        try:
            print(f"es-finetune {metadata.version('es-kernels')}")
        except metadata.PackageNotFoundError:
            print("es-finetune, not installed")
        parser.exit()


def _parse(arguments: list[str]) -> Options:
    """The command, and of its flags those that were given; those of --config below them."""
    parser = _Parser(
        prog="es-finetune",
        usage="es-finetune COMMAND [flags]",
        description="Fine-tune language models by evolution strategies.",
        epilog="`es-finetune COMMAND --help` lists the flags of a command.",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="show the version and exit"
    )
    _add_common_flags(parser)
    subparsers = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", prog="es-finetune", parser_class=_CommandParser
    )
    for name, command in COMMANDS.items():
        subparsers.add_parser(name, help=command.summary, command=name)
    first = next((word for word in arguments if not word.startswith("-")), None)
    if first is not None and first not in COMMANDS:
        near = did_you_mean(first, COMMANDS)
        raise UserError(f"unknown command {first!r}{near or '; the commands are ' + ', '.join(COMMANDS)}")
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:  # by a command's parser it is refused there
        parser.refuse_flag(unknown[0])
    options = vars(namespace)
    if options["command"] is None:
        raise UserError(f"no command given; the commands are {', '.join(COMMANDS)}, and es-finetune --help says more")
    command = COMMANDS[options["command"]]
    if command.config:
        require(f"es-finetune {options['command']}", "finetune", *FINETUNE)
    if (file := options.pop("config", None)) is not None:
        assert command.config is not None  # --config is a flag of such commands only
        flags = _flags_of(_read_config(file), command.config)
        options = vars(parser.parse_args([options["command"], *flags])) | options
    return options


def _add_common_flags(parser: argparse.ArgumentParser) -> None:
    for name, help in (
        ("quiet", "no messages but warnings and errors"),
        ("debug", "also messages for debugging, and the traceback of every error"),
    ):
        parser.add_argument(f"--{name}", action="store_true", default=argparse.SUPPRESS, help=help)


def _add_flags(parser: argparse.ArgumentParser, kind: type) -> None:
    """Of each field a flag; the namespace then holds those that were given."""
    from es_finetune.config import GROUPS, field_types

    types, fields = field_types(kind), dataclasses.fields(kind)
    for title in GROUPS:
        members = [option for option in fields if option.metadata["group"] == title]
        group = parser.add_argument_group(title) if members else parser
        for option in members:
            _add_flag(group, option, types[option.name])


def _add_flag(group: Any, option: dataclasses.Field, types: tuple[type, ...]) -> None:
    is_list, kind = (True, types[1]) if types[0] is list else (False, types[0])
    help, choices, default = option.metadata["help"].replace("%", "%%"), option.metadata["choices"], option.default
    if option.default_factory is not dataclasses.MISSING:
        default = " ".join(option.default_factory())
    shape: Options = {
        "type": _bool if kind is bool else kind,
        "metavar": "{" + ",".join(choices) + "}" if choices else {int: "INT", float: "FLOAT"}.get(kind, "TEXT"),
    }
    if is_list:
        shape["nargs"] = "+"
    if kind is bool:
        shape |= {"nargs": "?", "const": True, "metavar": "true|false"}
        default = str(default).lower()
    if default is dataclasses.MISSING:
        group.add_argument(option.name, type=kind, metavar=option.name.upper(), help=help)
        return
    if default not in (None, ""):
        help += f" (default: {default})"
    strings = dict.fromkeys((f"--{option.name}", f"--{option.name.replace('_', '-')}"))
    group.add_argument(*strings, default=argparse.SUPPRESS, help=help, **shape)
    if kind is bool and default == "true":
        strings = dict.fromkeys((f"--no_{option.name}", f"--no-{option.name.replace('_', '-')}"))
        group.add_argument(
            *strings, dest=option.name, action="store_false", default=argparse.SUPPRESS, help=f"--{option.name} false"
        )


def _bool(text: str) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        raise argparse.ArgumentTypeError(f"true or false was expected, not {text!r}")
    return text.lower() in _TRUE


def _underscored(name: str) -> str:
    return name.replace("-", "_")


def _flags_of(values: Mapping[str, Any], kind: str) -> list[str]:
    """The flags that ask for `values`. Through flags, so that types and wrong names are checked in one place.

    A file for train serves other commands too: of its options they take those that they have.
    """
    config = importlib.import_module("es_finetune.config")
    known, own = (
        [option.name for option in dataclasses.fields(one)] for one in (config.TrainConfig, getattr(config, kind))
    )
    options = {}
    for name, value in ((str(name), value) for name, value in values.items()):
        if name not in own:
            if name in known:
                continue
            raise UserError(f"unknown option {name!r}{did_you_mean(name, own) or '; --help lists them'}")
        options[name] = _NOTHING.get(name) if value in (None, []) else value
    return config.as_flags(options)


def _ready(name: str) -> Path:
    return CONFIGS / f"{name.removesuffix('.yaml')}.yaml"


def _config_file(name: str) -> Path:
    """The YAML file of this path, or that of this name which comes with the package."""
    from es_finetune.tasks import NAMES

    path = Path(name) if Path(name).exists() else _ready(name)
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
    return path


def _read_config(name: str) -> dict[str, Any]:
    """The options in a YAML file."""
    require("a YAML file", "finetune", "yaml")
    import yaml

    path = _config_file(name)
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML: {in_one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no options: it must be lines of NAME: VALUE")
    return values


# --- what is shown ----------------------------------------------------------------------------------------------------


def _hide_bars(quiet: bool) -> None:
    """Those of transformers, "Loading weights" and "Writing model shards", a second each around our own. Not the hub's,
    of gigabytes that are being downloaded, unless they are hidden already; transformers hides both."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    hidden = quiet or are_progress_bars_disabled()
    disable_progress_bar()
    if not hidden:
        enable_progress_bars()
