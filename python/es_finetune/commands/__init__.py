"""What `es-finetune` does, one function a command, for Python too: `es_finetune.evaluate(run="runs/x", samples=4)`.

A function takes the flags of its command as keyword arguments, which are the fields of one dataclass in config.py.
There each option has its type, default and help, once, for the command line, Python and type checkers. A function
prints nothing; what it has to say goes to `logging`, as "es_finetune".
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

P = ParamSpec("P")
Config = TypeVar("Config")
Result = TypeVar("Result")


def takes_options_of(
    kind: Callable[P, Config], complete: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> Callable[[Callable[[Config], Result]], Callable[P, Result]]:
    """Decorate a function of a config: it is then called with the config's fields, and has their signature.

    Args:
        kind: The dataclass.
        complete: Fills in options that were not given, by name, as those that a run's log holds.
    """

    def decorate(function: Callable[[Config], Result]) -> Callable[P, Result]:
        @functools.wraps(function)
        def call(*args: P.args, **options: P.kwargs) -> Result:
            completed = cast(dict[str, Any], options)
            if complete is not None:
                completed = complete(completed)
            return function(cast(Callable[..., Config], kind)(*args, **completed))

        signature = inspect.signature(kind).replace(return_annotation=inspect.signature(function).return_annotation)
        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return decorate
