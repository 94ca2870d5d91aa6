"""A function that runs in a process of its own and can be killed: rewards given by file or module, and graders that
parse.

`RewardProcess` is the parent's side. This file, run as a script, is the child's; it imports nothing but the standard
library and the function's own module, so that a child starts in a fraction of a second and holds no copy of torch. It
is a plain subprocess and no `multiprocessing` one, which would import the caller's main module again and fail in a
notebook.

The two speak JSON, one [number of the request, what is said] a line, over pipes that no code of the function sees: in
the child, file descriptor 0 is /dev/null and 1 is standard error, so `print` and `input` cannot come between.
Everything that can go wrong in the child is a `RewardError` for that one answer; the next one gets a fresh child, of
the same code: a function that was changed meanwhile is `RewardFailed`, which ends the run.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # the folder of this script holds modules whose names are nobody else's business
    sys.path[:] = [entry for entry in sys.path if entry != os.path.dirname(os.path.abspath(__file__))]

import ctypes
import hashlib
import importlib
import importlib.util
import inspect
import json
import resource
import select
import signal
import subprocess
import sysconfig
import time
import traceback
import weakref
from typing import Any

LOAD_SECONDS = 60.0  # to start Python and import the function's module
MEMORY_BYTES = 4 << 30  # address space beyond what the child has after importing; more is a MemoryError in the function
LARGEST = 1e100  # of a reward: sums of squares of them are finite
MAX_REPLY = 64 << 20  # bytes; the questions of a reasoning-gym dataset are a few million
PR_SET_PDEATHSIG = 1


class RewardError(Exception):
    """The function failed on one answer: it raised, ended its process, or was killed at its time limit. One line of
    text."""


class RewardFailed(RuntimeError):
    """Rewards fail, or are no longer those that the run began with, so that it cannot go on."""


class _NotLoaded(RewardError):
    """The child cannot import the function."""


class WrongType(ValueError):
    """What the function returned is no number, nor a dict of numbers: a mistake in the function, whatever the answer
    was."""


class RewardProcess:
    """`RewardProcess("file.py:function" or "module:function", seconds)(*arguments)` is the function's value, by way of
    JSON.

    The function is imported at once, in the child: ValueError if that fails. `attributes` holds the function's own
    `floor`, and `code`, a digest of what was imported (`code_digest`). A call that takes more than `seconds` ends with
    the whole process group of the child killed; every such answer costs that long, and the next one the start of a new
    child. Not thread-safe.

    The child sees no GPU, has one OpenMP thread, a fixed hash seed and `MEMORY_BYTES` of memory to work with. It dies
    with its parent, however that ends. Its working directory and import path are the parent's at construction.
    """

    def __init__(self, target: str, seconds: float):
        where, _, function = target.rpartition(":")
        if not where or not function.isidentifier():
            raise ValueError(f"reward {target!r} names no function; write module:function or file.py:function")
        if where.endswith(".py"):
            if not os.path.isfile(where):
                raise ValueError(f"reward {target!r}: there is no file {where}")
            where = os.path.abspath(where)
        self.target, self.seconds = target, seconds
        self._hello = {
            "where": where,
            "function": function,
            "path": [str(entry) for entry in sys.path],
            "memory": MEMORY_BYTES,
        }
        self._folder = os.getcwd()
        self._process: subprocess.Popen | None = None
        self._asked = 0  # number of the last request
        try:
            self.attributes: dict[str, Any] = self._start()
        except RewardError as error:
            self.close()
            raise ValueError(f"reward {target!r}: {error}") from None

    def __call__(self, *arguments: Any) -> Any:
        if self._process is None or self._ended():
            self._restart()
        return self._ask(arguments, self.seconds)

    def close(self) -> None:
        """Kills the child, if there is one, and what it started; a later call starts another."""
        if self._process is not None:
            self._process = None
            self._kill()

    def _restart(self) -> None:
        """RewardFailed where the function is another by now: half of a run's answers would be scored by the one, half
        by the other."""
        try:
            same, problem = self._start()["code"] == self.attributes["code"], "was changed"
        except _NotLoaded as error:
            same, problem = False, f"was changed, and {error}"
        if not same:
            self.close()
            raise RewardFailed(
                f"reward {self.target!r} {problem} while answers were scored by it: put it back as it was and go on, "
                "or begin again"
            )

    def _start(self) -> dict[str, Any]:
        self.close()
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        command = [sys.executable, os.path.abspath(__file__), str(os.getpid())]
        try:
            process = subprocess.Popen(
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                cwd=self._folder,
                start_new_session=True,
            )
        except OSError as error:
            raise RewardError(f"cannot start its process: {error}") from None
        os.set_blocking(process.stdin.fileno(), False)
        os.set_blocking(process.stdout.fileno(), False)
        self._process = process
        self._kill = weakref.finalize(self, _kill, process)  # at exit of the interpreter, too
        return self._ask(self._hello, LOAD_SECONDS)

    def _ended(self) -> bool:
        # Between questions the child has nothing to say, so anything to read is its end. Linux kills it when the thread
        # that started it ends (PR_SET_PDEATHSIG), which is no fault of the function.
        waiting = select.poll()  # select.select knows no descriptor above 1023
        waiting.register(self._process.stdout, select.POLLIN)
        return bool(waiting.poll(0))

    def _ask(self, request: Any, seconds: float) -> Any:
        self._asked += 1
        try:
            line = json.dumps([self._asked, request]).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise RewardError(f"the item is not JSON: {one_line(error)}") from None
        try:
            reply = _exchange(self._process, line, self._asked, seconds)
        except TimeoutError:
            self.close()
            raise RewardError(f"no result within {seconds:g} s, killed") from None
        except EOFError:
            process = self._process
            self.close()
            raise RewardError(_ending(process.returncode)) from None
        except (ValueError, RecursionError):
            self.close()
            raise RewardError("its process wrote something that is no reply, killed") from None
        except BaseException:  # Ctrl-C: what the child is at would keep the next question waiting
            self.close()
            raise
        if "error" in reply:
            raise {"load": _NotLoaded, "type": WrongType}.get(reply.get("kind"), RewardError)(reply["error"])
        return reply["value"]


def _exchange(process: subprocess.Popen, line: bytes, number: int, seconds: float) -> dict[str, Any]:
    """Sends the line of a request and gives its reply; late ones of requests before it are dropped. TimeoutError,
    EOFError; ValueError for what is no reply, or grows beyond `MAX_REPLY`."""
    deadline = time.monotonic() + seconds
    to, back = process.stdin.fileno(), process.stdout.fileno()
    waiting = select.poll()
    waiting.register(to, select.POLLOUT)
    rest = memoryview(line)
    while rest:
        _wait(waiting, deadline)
        try:
            rest = rest[os.write(to, rest) :]
        except BlockingIOError:
            continue
        except BrokenPipeError:
            raise EOFError from None
    waiting.unregister(to)
    waiting.register(back, select.POLLIN)
    received = bytearray()
    while True:
        _wait(waiting, deadline)
        part = os.read(back, 1 << 20)
        if not part:
            raise EOFError
        received += part
        if len(received) > MAX_REPLY:
            raise ValueError
        if b"\n" not in part:
            continue
        *lines, received = received.split(b"\n")
        for reply in map(json.loads, lines):
            if not (
                isinstance(reply, list)
                and len(reply) == 2
                and type(reply[0]) is int
                and reply[0] <= number
                and isinstance(reply[1], dict)
            ):
                raise ValueError
            if reply[0] == number:
                return reply[1]


def _wait(waiting: select.poll, deadline: float) -> None:
    # More milliseconds poll() does not know
    if not waiting.poll(min(1000 * max(deadline - time.monotonic(), 0), 2**31 - 1)):
        raise TimeoutError


def _kill(process: subprocess.Popen) -> None:
    # Only wait() reaps the child, so until then its number, and the group's, can be nobody else's.
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.stdin.close()
    process.stdout.close()
    process.wait()


def _ending(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"its process was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


# --- what both sides, and rewards in this process, make of values and exceptions
# ----------------------------------------


def number(value: Any, what: str) -> float:
    """`value` as a finite float: numbers, bools, NumPy and torch scalars, but no text. WrongType, or ValueError for
    NaN, infinities and what is nearly one."""
    kind = type(value)
    if isinstance(value, (str, bytes)) or not (hasattr(kind, "__float__") or hasattr(kind, "__index__")):
        raise WrongType(f"{what} is {'None' if value is None else 'of type ' + kind.__name__}, not a number")
    try:
        value = float(value)
    except OverflowError:
        raise ValueError(f"{what} is too large a number") from None
    except Exception:
        raise WrongType(f"{what} is of type {kind.__name__} and no single number") from None
    if not abs(value) <= LARGEST:
        raise ValueError(f"{what} is {value}")
    return value


def parts(value: Any) -> tuple[float, float | None, float | None]:
    """(reward, exact, format) of what a reward function returned: a number, or a dict of them. WrongType, or ValueError
    for a bad number."""
    if not isinstance(value, dict):
        return number(value, "the reward"), None, None
    unknown = sorted(set(map(str, value)) - {"reward", "exact", "format"})
    if unknown or "reward" not in value:
        problem = f"has {unknown[0][:40]!r}" if unknown else "has no 'reward'"
        raise WrongType(f"the dict returned {problem}; it takes reward, and if wanted exact and format")
    shares = []
    for name in ("exact", "format"):
        share = None if value.get(name) is None else number(value[name], name)
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"{name} is {share}, outside 0 to 1")
        shares.append(share)
    return number(value["reward"], "the reward"), *shares


def one_line(error: BaseException, file: str | None = None) -> str:
    """Type, text and, if the exception passed through `file`, the line there; printable, at most some 300
    characters."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # an exception whose own __str__ fails
        text = ""
    text = text[:240].encode("utf-8", "backslashreplace").decode()
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if file and frame.filename == file]
    return (
        type(error).__name__
        + (f": {text}" if text else "")
        + (f" ({os.path.basename(file)}:{lines[-1]})" if lines else "")
    )


# --- the child --------------------------------------------------------------------------------------------------------


def import_function(where: str, name: str) -> Any:
    """The callable `name` of a module or of a file that ends in .py. ValueError, in one line, for whatever stands
    against it."""
    try:
        if where.endswith(".py"):
            # At the end: a file beside it can be imported, and none can stand in for an installed package.
            sys.path.append(os.path.dirname(where))
            spec = importlib.util.spec_from_file_location("es_finetune_reward", where)
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
    found = (getattr(module, "__file__", None) for key, module in list(sys.modules.items()) if key != "__main__")
    files = {os.path.realpath(file) for file in found if isinstance(file, str)}
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
    return getattr(sys.modules.get(getattr(function, "__module__", None)), "__file__", None)


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


def _answer(function: Any, arguments: list[Any], file: str | None) -> bytes:
    try:
        value = function(*arguments)
    except BaseException as error:  # SystemExit and MemoryError, too: the next answer is none the worse for it
        return json.dumps({"error": one_line(error, file)}).encode()
    try:
        return json.dumps({"value": value}, default=lambda value: number(value, "the reward or a part of it")).encode()
    except Exception as error:
        wrong = not isinstance(error, ValueError) or isinstance(error, WrongType)
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
    reply = _answer(lambda: {"floor": getattr(function, "floor", None), "code": code}, [], file)
    while True:
        replies.write(b"[%d, %s]\n" % (number, reply))
        replies.flush()
        line = requests.readline()
        if not line:
            # The parent is gone or has closed; threads that the function left behind must not keep this alive
            os._exit(0)
        number, arguments = json.loads(line)
        reply = _answer(function, arguments, file)


if __name__ == "__main__":
    _main()
