"""`python -m es_finetune <command> [flags]`. Exit code 2 and one line on stderr for a config that cannot run."""

from __future__ import annotations

import sys

USAGE = """usage: python -m es_finetune <command> [flags]

commands:
  train    fine-tune a model by evolution strategies; without flags but --output, a one-minute demo on an embedded model

`python -m es_finetune <command> --help` lists the flags."""


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"train": _train}
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if not arguments or arguments[0] not in commands:
        print(f"error: {'no command given' if not arguments else f'unknown command {arguments[0]!r}'}\n{USAGE}", file=sys.stderr)
        return 2
    return commands[arguments[0]](arguments[1:])


def _train(arguments: list[str]) -> int:
    from transformers import HfArgumentParser
    from transformers.utils.logging import disable_progress_bar

    from es_finetune.trainer import TrainConfig, Trainer

    disable_progress_bar()  # "Loading weights", "Writing model shards": two bars of a second each around our own
    parser = HfArgumentParser(TrainConfig, prog="python -m es_finetune train")
    try:
        (config,) = parser.parse_args_into_dataclasses(arguments)
        trainer = Trainer(config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    summary = trainer.run()
    print(
        f"held-out exact {summary['base_exact']:.3f} -> {summary['final_exact']:.3f} in {summary['generations']} generations and "
        f"{summary['seconds_total']:.1f} s (kernels {summary['seconds_kernels']:.2f} s); theta {summary['fingerprint']}; {config.output}"
    )
    return 0
