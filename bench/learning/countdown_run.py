"""A whole learning run on the paper's Countdown: a base model, a sigma for it, ES by the command line, and its replay
elsewhere.

    python -m bench.learning.countdown_run --out FOLDER [--seconds 480] [--base FOLDER]

Pre-trains a model of 21 million parameters (countdown_model.py) or takes the one of --base, asks `calibrate` for a
sigma, trains with the task's own questions (200 to train on, all answered by each of 30 members; 500 held out) until
the time is over, stops the run as a user would (Ctrl-C), finishes it with --resume, and replays its log on the same
device and on the CPU. Leaves in FOLDER

    countdown-MACHINE.json    settings, curve, shares of the time, fingerprints of run and replays
    countdown-MACHINE/        run.log, metrics.jsonl, evals.jsonl, reward.png
    work/                     the base model and the whole run

It takes about 8 minutes by default. It shows that the whole path learns there, and where its time goes; not that ES
teaches a small model to reason: most of the gain is the style in which it answers (see countdown_model.py).
"""

import argparse
import functools
import json
import logging
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import torch

from bench.common import environment
from bench.learning.countdown_model import MAX_NEW_TOKENS
from es_finetune.commands.calibrate import calibrate
from es_finetune.config import PAPER
from es_finetune.runs.files import read_rows, write_atomically
from es_finetune.runs.log import is_begun, read_log

KEPT = ("run.log", "metrics.jsonl", "evals.jsonl", "reward.png")
AFTER = 110  # seconds for what follows the training: it starts again to finish, and two replays
TO_STOP = 30
TO_LOOK = 2  # seconds between two questions whether a command is to be stopped
TO_COMPILE = 150  # seconds after which a decoding that makes no generations is given up
LEAST = 2  # generations: the first compiles, so that what a generation costs is known of the second
SHARE_OF_PRETRAINING = 0.25


def es_finetune(*arguments, stop=lambda: False):
    """Runs a command; Ctrl-C as soon as stop() says so, and where that does not help, the end. Returns (exit code, what
    it printed)."""
    print("$ es-finetune " + " ".join(map(str, arguments)), flush=True)
    # A shell ignores Ctrl-C for what it runs in the background, and a child would inherit that.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, "-m", "es_finetune", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=heed)
    asked = None
    while True:
        try:
            text, _ = process.communicate(timeout=TO_LOOK)
            break
        except subprocess.TimeoutExpired:
            if asked is None and stop():
                process.send_signal(signal.SIGINT)
                asked = time.monotonic()
            elif asked is not None and time.monotonic() - asked > TO_STOP:
                process.kill()  # nothing is lost: the log has every generation
    print(text[-1500:], flush=True)
    return process.returncode, text


def pretrain(*arguments):
    """In a process of its own, which gives back its memory."""
    subprocess.run([sys.executable, "-m", "bench.learning.countdown_model", *map(str, arguments)], check=True)


def trained(run, flags, decodings, seconds):
    """Trains until the time is over and there are LEAST generations, then finishes the run. The first decoding with
    which a generation is made in time serves; returns it and its command."""
    begin = time.monotonic()
    for decoding in decodings:
        started, last = time.monotonic(), decoding == decodings[-1]

        def stop(started=started, last=last):
            late, done = time.monotonic() - started > TO_COMPILE, generations(run)
            hangs = late and not last and not done
            return hangs or (time.monotonic() - begin > seconds and (late or done >= LEAST))

        command = ["train", "--output", run, *flags, "--decoding", decoding]
        code, text = es_finetune(*command, "--generations", 100_000, "--overwrite", stop=stop)
        done = generations(run)
        if done:
            break
        print(f"decoding {decoding}: no generation was made (exit {code})", file=sys.stderr)
    else:
        raise SystemExit(f"no generation was made: {_last_line(code, text)}")
    code, text = es_finetune("train", "--resume", "--output", run, "--generations", done)
    if code:
        raise SystemExit(f"the run could not be finished: {_last_line(code, text)}")
    return decoding, ["es-finetune", *map(str, command)]


def _last_line(code, text):
    """Of what a command printed; one that is stopped while it starts prints nothing."""
    return next(reversed(text.strip().splitlines()), f"exit code {code}")


def generations(run):
    return len(read_log(run / "run.log")[1]) if is_begun(run / "run.log") else 0


def replayed(run, device):
    """(theta's fingerprint, seconds) of a replay."""
    begin = time.monotonic()
    code, text = es_finetune("replay", run, "--device", device)
    if code:
        raise SystemExit(f"the replay on {device} failed: {_last_line(code, text)}")
    return {"theta": re.search(r"theta ([0-9a-f]{16})", text)[1], "seconds": time.monotonic() - begin}


def of_generations(run):
    """What metrics.jsonl tells: the members' mean reward in the first generation and in the last; and of the
    generations after the first, which compiles, {part: share of the time} and seconds of one, or None where there are
    none."""
    rows = read_rows(run / "metrics.jsonl")
    figures = {"reward": [rows[0]["reward_mean"], rows[-1]["reward_mean"]]}
    figures |= {"shares": None, "seconds_a_generation": None}
    total = sum(row["seconds"] for row in rows[1:])
    if total:
        shares = {
            part: sum(row[f"seconds_{part}"] for row in rows[1:]) / total for part in ("generate", "score", "kernels")
        }
        figures |= {
            "shares": shares | {"outside generation": 1 - shares["generate"]},
            "seconds_a_generation": total / len(rows[1:]),
        }
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seconds", type=float, default=480, help="of everything, about")
    parser.add_argument(
        "--decoding", nargs="+", default=["static", "dynamic"] if torch.cuda.is_available() else ["dynamic"]
    )
    parser.add_argument(
        "--model",
        nargs="+",
        default=[],
        metavar="FLAG",
        help="of countdown_model.py, without their dashes: hidden=64 layers=2",
    )
    parser.add_argument(
        "--train",
        nargs="+",
        default=[],
        metavar="FLAG",
        help="of es-finetune train, likewise: population=8 eval_items=50",
    )
    parser.add_argument("--sigma", type=float, help="left out: what calibrate finds")
    parser.add_argument(
        "--base", type=pathlib.Path, help="folder of a model to begin with, instead of pre-training one"
    )
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("es_finetune").setLevel(logging.INFO)
    begin, work = time.monotonic(), args.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = environment.describe(device)

    if args.base:
        base, about = args.base, {"base": args.base.name}
    else:
        base = work / "base"
        pretrain("--output", base, "--seconds", SHARE_OF_PRETRAINING * args.seconds, *_flags(args.model))
        about = json.loads((base / "pretraining.json").read_text())
    sigma = args.sigma or _calibrated(base)
    settings = [
        f"model={base}",
        "task=countdown",
        f"max_new_tokens={MAX_NEW_TOKENS}",
        "batch_size=200",
        f"sigma={sigma}",
        f"lr={sigma}",
    ]
    flags = _flags([*settings, "eval_every=25", "eval_items=500", "report_to=none", *args.train])
    run = work / "run"
    decoding, command = trained(run, flags, args.decoding, args.seconds - AFTER - (time.monotonic() - begin))
    summary = json.loads((run / "summary.json").read_text())
    replays = {where: replayed(run, where) for where in dict.fromkeys((device, "cpu"))}
    es_finetune("report", run)
    name = f"countdown-{environment.slug(facts)}"
    report = {
        "machine": facts,
        "model": about,
        "command": command,
        "sigma": sigma,
        "decoding": decoding,
        "summary": summary,
        **of_generations(run),
        "replays": replays,
        "replays_equal_the_run": all(replay["theta"] == summary["fingerprint"] for replay in replays.values()),
    }
    (args.out / name).mkdir(exist_ok=True)
    for file in KEPT:
        shutil.copy(run / file, args.out / name / file)
    write_atomically(args.out / f"{name}.json", json.dumps(report, indent=1) + "\n")
    print(
        json.dumps(
            {
                key: report[key]
                for key in (
                    "sigma",
                    "decoding",
                    "reward",
                    "shares",
                    "seconds_a_generation",
                    "replays",
                    "replays_equal_the_run",
                )
            },
            indent=1,
        )
    )
    print(
        f"held-out exact {summary['base']:.3f} -> {summary['final']:.3f} in {summary['generations']} generations; "
        f"{time.monotonic() - begin:.0f} s"
    )
    sys.exit(not report["replays_equal_the_run"])


def _calibrated(base):
    """The sigma that calibrate recommends; where it finds none, the paper's."""
    try:
        calibration = calibrate(model=str(base), task="countdown", max_new_tokens=MAX_NEW_TOKENS, batch_size=200)
    except ValueError as error:  # it answers too few questions
        print(error)
        return PAPER["sigma"]
    return calibration["sigma"] or PAPER["sigma"]


def _flags(pairs):
    return [part for pair in pairs for part in (f"--{pair.partition('=')[0]}", pair.partition("=")[2])]


if __name__ == "__main__":
    main()
