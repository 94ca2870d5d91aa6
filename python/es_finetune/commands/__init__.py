"""What `es-finetune` does, one function a command, for Python too: `es_finetune.evaluate(run="runs/x", samples=4)`.

A function takes the flags of its command as keyword arguments, which are the fields of one dataclass in config.py.
There each option has its type, default and help, once, for the command line, Python and type checkers. A function
prints nothing; what it has to say goes to `logging`, as "es_finetune".
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, overload

P = ParamSpec("P")
Config = TypeVar("Config")
Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class Command(Protocol[P, Result_co]):
    """A function of options, some of which may be objects."""

    @overload
    def __call__(self, *args: P.args, **options: P.kwargs) -> Result_co: ...
    @overload
    def __call__(self, *, data: Iterable[Mapping[str, Any]], **options: Any) -> Result_co: ...
    @overload
    def __call__(self, *, reward: Callable[[str, dict], Any], **options: Any) -> Result_co: ...


def takes_options_of(
    kind: Callable[P, Config], complete: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> Callable[[Callable[Concatenate[Config, ...], Result]], Command[P, Result]]:
    """Decorate a function of a config: it is then called with the config's fields, and has their signature.

    An option that the function takes beside the config, by the same name, may be an object: what is no text or path
    goes to the function as it is, and the config is made without it.

    Args:
        kind: The dataclass.
        complete: Fills in options that were not given, by name, as those that a run's log holds.

    Returns:
        The decorator.
    """

    def decorate(function: Callable[Concatenate[Config, ...], Result]) -> Any:
        own = inspect.signature(function)
        beside = list(own.parameters.values())[1:]

        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Result:
            if complete is not None:
                options = complete(options)
            objects = {
                parameter.name: options.pop(parameter.name)
                for parameter in beside
                if not isinstance(options.get(parameter.name, ""), (str, os.PathLike))
            }
            return function(kind(*args, **options), **objects)

        options = inspect.signature(kind).parameters
        taken = {**options, **{parameter.name: parameter for parameter in beside}}
        call.__signature__ = own.replace(parameters=list(taken.values()))  # type: ignore[attr-defined]
        return call

    return decorate
