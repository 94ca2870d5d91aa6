"""A function that runs in a process of its own and can be killed: rewards given by file or module, and graders that
parse.

`RewardProcess` is the parent's side, `sandbox` the script that the child runs: a plain subprocess and no
`multiprocessing` one, which would import the caller's main module again and fail in a notebook.

The two speak JSON, one [number of the request, what is said] a line, over pipes that no code of the function sees: in
the child, file descriptor 0 is /dev/null and 1 is standard error, so `print` and `input` cannot come between.
Everything that can go wrong in the child is a `RewardError` for that one answer; the next one gets a fresh child, of
the same code: a function that was changed meanwhile is `errors.RewardFailed`, which ends the run.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from typing import IO, Any

from es_finetune.errors import RewardFailed, UserError
from es_finetune.tasks import sandbox
from es_finetune.tasks.sandbox import RewardTypeError, one_line

LOAD_SECONDS = 60.0  # to start Python and import the function's module
MEMORY_BYTES = 4 << 30  # address space beyond what the child has after importing; more is a MemoryError in the function
MAX_REPLY = 64 << 20  # bytes; the questions of a reasoning-gym dataset are a few million


class RewardError(Exception):
    """The function failed on one answer: it raised, ended its process, or was killed at its time limit. One line of
    text."""


class _NotLoaded(RewardError):
    """The child cannot import the function."""


class RewardProcess:
    """`RewardProcess("file.py:function" or "module:function", seconds)(*arguments)` is the function's value, by way of
    JSON.

    The child sees no GPU, has one OpenMP thread, a fixed hash seed and `MEMORY_BYTES` of memory to work with. It dies
    with its parent, however that ends. Its working directory and import path are the parent's at construction. Not
    thread-safe.

    Args:
        target: where the function is. It is imported at once, in the child.
        seconds: that a call may take. One that takes more ends with the whole process group of the child killed: every
            such answer costs that long, and the next one the start of a new child.

    Attributes:
        attributes: "floor", the function's own, and "code", the digest of what was imported (`sandbox.code_digest`).

    Raises:
        UserError: the function cannot be imported, or cannot be called with a completion and an item.
        RewardError: by a call, for what went wrong with this answer.
        RewardTypeError: by a call, for a value that is no reward whatever the answer.
        RewardFailed: by a call, where the function is no longer the one that was imported first.
    """

    def __init__(self, target: str, seconds: float):
        where, _, function = target.rpartition(":")
        if not where or not function.isidentifier():
            raise UserError(f"reward {target!r} names no function; write module:function or file.py:function")
        if where.endswith(".py"):
            if not os.path.isfile(where):
                raise UserError(f"reward {target!r}: there is no file {where}")
            where = os.path.abspath(where)
        self.target, self.seconds = target, seconds
        self._hello = {
            "where": where,
            "function": function,
            "path": [str(entry) for entry in sys.path],
            "memory": MEMORY_BYTES,
        }
        self._folder = os.getcwd()
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = 0  # number of the last request
        try:
            self.attributes: dict[str, Any] = self._start()
        except RewardError as error:
            self.close()
            raise UserError(f"reward {target!r}: {error}") from None

    def __call__(self, *arguments: Any) -> Any:
        if self._process is None or _ended(self._process):
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
        command = [sys.executable, os.path.abspath(sandbox.__file__), str(os.getpid())]
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
        for pipe in _pipes(process):
            os.set_blocking(pipe.fileno(), False)
        self._process = process
        self._kill = weakref.finalize(self, _kill, process)  # at exit of the interpreter, too
        return self._ask(self._hello, LOAD_SECONDS)

    def _ask(self, request: Any, seconds: float) -> Any:
        self._asked += 1
        try:
            line = json.dumps([self._asked, request]).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise RewardError(f"the item is not JSON: {one_line(error)}") from None
        process = self._process
        assert process is not None
        try:
            reply = _exchange(process, line, self._asked, seconds)
        except TimeoutError:
            self.close()
            raise RewardError(f"no result within {seconds:g} s, killed") from None
        except EOFError:
            self.close()
            raise RewardError(_ending(process.returncode)) from None
        except (ValueError, RecursionError):
            self.close()
            raise RewardError("its process wrote something that is no reply, killed") from None
        except BaseException:  # Ctrl-C: what the child is at would keep the next question waiting
            self.close()
            raise
        if "error" in reply:
            raise {"load": _NotLoaded, "type": RewardTypeError}.get(str(reply.get("kind")), RewardError)(reply["error"])
        return reply["value"]


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin is not None and process.stdout is not None
    return process.stdin, process.stdout


def _ended(process: subprocess.Popen[bytes]) -> bool:
    # Between questions the child has nothing to say, so anything to read is its end. Linux kills it when the thread
    # that started it ends (PR_SET_PDEATHSIG), which is no fault of the function.
    waiting = select.poll()  # select.select knows no descriptor above 1023
    waiting.register(_pipes(process)[1], select.POLLIN)
    return bool(waiting.poll(0))


def _exchange(process: subprocess.Popen[bytes], line: bytes, number: int, seconds: float) -> dict[str, Any]:
    """Sends the line of a request and gives its reply; late ones of requests before it are dropped. TimeoutError,
    EOFError; ValueError for what is no reply, or grows beyond `MAX_REPLY`."""
    deadline = time.monotonic() + seconds
    to, back = (pipe.fileno() for pipe in _pipes(process))
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
                and reply[1].keys() & {"value", "error"}
            ):
                raise ValueError
            if reply[0] == number:
                return reply[1]


def _wait(waiting: select.poll, deadline: float) -> None:
    # More milliseconds poll() does not know
    if not waiting.poll(min(1000 * max(deadline - time.monotonic(), 0), 2**31 - 1)):
        raise TimeoutError


def _kill(process: subprocess.Popen[bytes]) -> None:
    # Only wait() reaps the child, so until then its number, and the group's, can be nobody else's.
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    for pipe in _pipes(process):
        pipe.close()
    process.wait()


def _ending(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"its process was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
