"""What a reward function or a grader runs in: the child's side of `reward_process`, a script.

As a script it imports nothing but the standard library and the function's own module, so that a child starts in a
fraction of a second and holds no copy of torch. The parent, and rewards in the parent's own process, import from here
what has to be the same on either side: what counts as a reward, and how an exception reads.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # no module beside this script may stand in for one that the function imports
    sys.path[:] = [entry for entry in sys.path if entry != os.path.dirname(os.path.abspath(__file__))]

import ctypes
import hashlib
import importlib
import importlib.util
import inspect
import json
import resource
import signal
import sysconfig
import traceback
from collections.abc import Callable
from typing import Any

MAX_REWARD = 1e100  # sums of squares of rewards are finite; the optimizer has the same limit
PR_SET_PDEATHSIG = 1


class RewardTypeError(ValueError):
    """What the function returned is no number, nor a dict of numbers: a mistake in the function, whatever the answer
    was."""


# --- on both sides ----------------------------------------------------------------------------------------------------


def finite_number(value: Any, what: str) -> float:
    """`value` as a finite float: of numbers, bools, NumPy and torch scalars, but no text.

    Raises:
        RewardTypeError: it is no single number.
        ValueError: it is NaN or infinite, or larger than `MAX_REWARD`.
    """
    kind = type(value)
    if isinstance(value, (str, bytes)) or not (hasattr(kind, "__float__") or hasattr(kind, "__index__")):
        raise RewardTypeError(f"{what} is {'None' if value is None else 'of type ' + kind.__name__}, not a number")
    try:
        value = float(value)
    except OverflowError:
        raise ValueError(f"{what} is too large a number") from None
    except Exception:
        raise RewardTypeError(f"{what} is of type {kind.__name__} and no single number") from None
    if not abs(value) <= MAX_REWARD:
        raise ValueError(f"{what} is {value}")
    return value


def score_parts(value: Any) -> tuple[float, float | None, float | None]:
    """(reward, exact, format) of what a reward function returned: a number, or a dict of them.

    Raises:
        RewardTypeError: it is neither.
        ValueError: a number in it is none that can be used.
    """
    if not isinstance(value, dict):
        return finite_number(value, "the reward"), None, None
    unknown = sorted(set(map(str, value)) - {"reward", "exact", "format"})
    if unknown or "reward" not in value:
        problem = f"has {unknown[0][:40]!r}" if unknown else "has no 'reward'"
        raise RewardTypeError(f"the dict returned {problem}; it takes reward, and if wanted exact and format")
    exact, format = (_share(value.get(name), name) for name in ("exact", "format"))
    return finite_number(value["reward"], "the reward"), exact, format


def _share(value: Any, what: str) -> float | None:
    if value is None:
        return None
    share = finite_number(value, what)
    if not 0 <= share <= 1:
        raise ValueError(f"{what} is {share}, outside 0 to 1")
    return share


def one_line(error: BaseException, file: str | None = None) -> str:
    """Type, text and, if the exception passed through `file`, the line there; printable, at most some 300
    characters."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # an exception whose own __str__ fails
        text = ""
    text = text[:240].encode("utf-8", "backslashreplace").decode()
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    place = f" ({os.path.basename(file)}:{lines[-1]})" if file and lines else ""
    return type(error).__name__ + (f": {text}" if text else "") + place


# --- in the child -----------------------------------------------------------------------------------------------------


def import_function(where: str, name: str) -> Any:
    """The callable `name` of a module or of a file that ends in .py. ValueError, in one line, for whatever stands
    against it."""
    try:
        if where.endswith(".py"):
            # At the end: a file beside it can be imported, and none can stand in for an installed package.
            sys.path.append(os.path.dirname(where))
            spec = importlib.util.spec_from_file_location("es_finetune_reward", where)
            assert spec is not None and spec.loader is not None  # of a name that ends in .py
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # dataclasses look their module up
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
    except BaseException as error:
        raise ValueError(f"cannot be imported: {one_line(error, where)}") from None
    function = getattr(module, name, None)
    if not callable(function):
        if function is None:
            raise ValueError(f"{os.path.basename(where)} has no function {name!r}")
        raise ValueError(f"{name!r} is no function but {function!r:.60}")
    return function


def code_digest(where: str, name: str) -> str | None:
    """16 hex digits of the code behind `import_function(where, name)`: the function's name, the content of the file it
    was asked of, and of each module that has been imported from beside or below that file (of module "a.b": beside or
    below package a). Wherever the files lie, equal code has equal digits. Not covered: the interpreter and installed
    packages, and what the function imports or reads when it is called. None where there is no file."""
    own = where if where.endswith(".py") else getattr(sys.modules[where], "__file__", None)
    if not own:
        return None
    own = os.path.realpath(own)
    root = os.path.dirname(own)
    if not where.endswith(".py"):
        for _ in range(where.count(".") + (os.path.basename(own) == "__init__.py")):
            root = os.path.dirname(root)
    installed = tuple(
        os.path.join(os.path.realpath(sysconfig.get_path(kind)), "")
        for kind in ("stdlib", "platstdlib", "purelib", "platlib")
    )
    imported = (getattr(module, "__file__", None) for key, module in list(sys.modules.items()) if key != "__main__")
    files = {os.path.realpath(file) for file in imported if isinstance(file, str)}
    beside = {
        path
        for path in files
        if path.startswith(os.path.join(root, "")) and not path.startswith(installed) and os.path.isfile(path)
    }
    state = hashlib.blake2b(digest_size=8)
    for label, path in [(name, own), *sorted((os.path.relpath(path, root), path) for path in beside - {own})]:
        with open(path, "rb") as file:
            content = file.read()
        for part in (label.encode("utf-8", "surrogateescape"), content):
            # With its length, so that no two lists of files run together
            state.update(len(part).to_bytes(8, "little") + part)
    return state.hexdigest()


def source_file(function: Any) -> str | None:
    """The file that `function` is defined in, or None."""
    return getattr(sys.modules.get(getattr(function, "__module__", None) or ""), "__file__", None)


def check_signature(function: Any) -> None:
    """ValueError if `function` cannot be called with a completion and an item."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in functions have none
        return
    try:
        signature.bind("", {})
    except TypeError:
        raise ValueError(
            f"is called as reward(completion, item), but its signature is {str(signature)[:100]}"
        ) from None


def _reply(function: Callable[..., Any], arguments: list[Any], file: str | None) -> bytes:
    try:
        value = function(*arguments)
    except BaseException as error:  # SystemExit and MemoryError, too: the next answer is none the worse for it
        return json.dumps({"error": one_line(error, file)}).encode()
    try:
        return json.dumps(
            {"value": value}, default=lambda value: finite_number(value, "the reward or a part of it")
        ).encode()
    except Exception as error:
        wrong = not isinstance(error, ValueError) or isinstance(error, RewardTypeError)
        return json.dumps({"error": str(error)[:300], **({"kind": "type"} if wrong else {})}).encode()


def _main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):  # it was gone before the line above
        return
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    number, hello = json.loads(requests.readline())
    sys.path[:] = hello["path"]
    sys.argv[1:] = []
    try:
        function = import_function(hello["where"], hello["function"])
        check_signature(function)
        code = code_digest(hello["where"], hello["function"])
    except (ValueError, OSError) as error:
        replies.write(json.dumps([number, {"error": str(error), "kind": "load"}]).encode() + b"\n")
        replies.flush()
        return
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = used + hello["memory"] if hard == resource.RLIM_INFINITY else min(hard, used + hello["memory"])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    file = source_file(function)
    reply = _reply(lambda: {"floor": getattr(function, "floor", None), "code": code}, [], file)
    while True:
        replies.write(b"[%d, %s]\n" % (number, reply))
        replies.flush()
        line = requests.readline()
        if not line:
            # The parent is gone or has closed; threads that the function left behind must not keep this alive
            os._exit(0)
        number, arguments = json.loads(line)
        reply = _reply(function, arguments, file)


if __name__ == "__main__":
    _main()
