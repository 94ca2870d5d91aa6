"""Errors that a user can mend, and the words that say how. Every other exception is a bug of es_finetune.

UserError(ValueError)     what was asked for cannot be done; found before long work wherever that is possible
RunError(RuntimeError)    a run that had begun cannot go on
  RewardFailed            because of its reward
  WorkersDiffer           because its workers do not hold the same weights
  RunStopped              what `es-finetune train` says of any reason; chained to it
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
from collections.abc import Iterable, Iterator

# What every command needs, beside what these bring; `tensorboard` is asked for where curves go to it.
FINETUNE = ("transformers", "rich", "matplotlib", "jinja2")


class UserError(ValueError):
    """What was asked for cannot be done: one line that names the thing and the remedy."""


class RunError(RuntimeError):
    """A run that had begun cannot go on, for a reason outside of es_finetune: reward, machine, memory."""


class RewardFailed(RunError):
    """Rewards fail, or are no longer those that the run began with."""


class WorkersDiffer(RunError):
    """Workers that should hold the same weights, or be on the same run, do not."""


class RunStopped(RunError):
    """A run ended before its end: why, what is kept, and how to go on. Its cause is what stopped it."""


def is_foreseen(error: BaseException) -> bool:
    """Whether the words of an error are enough: it is the user's, the run's or the operating system's, no bug."""
    of_torch = type(error).__name__ == "OutOfMemoryError"  # known by name: to import torch takes two seconds
    return of_torch or isinstance(error, (UserError, RunError, OSError, MemoryError, KeyboardInterrupt))


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn any failure within into a UserError that begins with `what`: what transformers, PEFT and the hub say, in
    every type of error, can be a page."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what} could not be loaded: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What it says in its first line that is not empty, or else its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def in_one_line(error: BaseException) -> str:
    """All that it says, or else its type."""
    return " ".join(str(error).split()) or type(error).__name__


def require(what: str, extra: str, *modules: str) -> None:
    """UserError, with the extra of es-kernels that brings them, unless these modules are installed."""
    missing = [name.replace("_", "-") for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{what} needs the package{'s' * (len(missing) > 1)} {', '.join(missing)}: pip install "
            f"'es-kernels[{extra}]'"
        )


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """ ": did you mean ...?" with the nearest of the known words, up to three, each with `prefix`; nothing where none
    is near."""
    forms, plain = {_plain(name): name for name in known}, _plain(word)
    begin = [form for form in forms if len(plain) > 2 and form.startswith(plain)]
    near = [plain] if plain in forms else begin or difflib.get_close_matches(plain, forms, n=1, cutoff=0.7)
    return f": did you mean {' or '.join(prefix + forms[form] for form in near[:3])}?" if near else ""


def _plain(word: str) -> str:
    return word.lower().replace("-", "_")
