"""The run as a log: with the base model, run.log is all that is needed to make the tuned weights again, bit for bit.

run.log is JSON, one object a line, each with a CRC-32 of what stands before it as its last key:

    {"run": 2, "noise_version": 1, "config": {...}, "model": {...}, ..., "crc": "89abcdef"}
    {"generation": 0, "z": "<base64 of N little-endian f32>", "scored": 30, "reward": 0.41, "lr": [...], "sigma": [...],
     "theta": "<16 hex>", "live": "<16 hex>", "crc": "..."}

The first line is the header, each other one a generation, or {"generations": 40, "crc": "..."} where the run went on to
another number of them than the lines before it say. The header's versions and machine are those that the run began
with; nothing but the report reads them.

z is null where all rewards were equal and nothing was changed; "dropped" names members that a pool of workers gave up,
if any. lr and sigma are one number for each param_group, theta and live the fingerprints after the update. About 400
bytes a generation with N = 30.

The journal beside it has the same form, one line for each member of the generation in progress that has been scored. A
score that is in it is never computed again: greedy text may differ between machines, and the run must not. Under
torchrun every rank but the first has one of its own, journal-RANK.

Both files only grow, a line per write, so what a killed writer leaves is whole lines and at most one torn last one,
without its newline, which is dropped. A line of run.log has reached the disk before the run goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from es_finetune.errors import UserError
from es_finetune.optim.options import finite, whole
from es_finetune.optim.update import Update

FORMAT = 2  # in 1 the option master was called base
_SEAL = ', "crc": "%08x"}\n'
_SEAL_LENGTH = len(_SEAL % 0)


class Generation(NamedTuple):
    """One generation as the log keeps it."""

    update: Update
    lr: tuple[float, ...]  # of each param_group
    sigma: tuple[float, ...]
    theta: int  # fingerprints after the update
    live: int

    @classmethod
    def after(cls, update: Update, result: dict[str, Any]) -> Generation:
        """What the log keeps of an update; `result`: what the workers' `update` returned."""
        return cls(update, tuple(result["lr"]), tuple(result["sigma"]), result["theta"], result["live"])

    def to_json(self) -> dict[str, Any]:
        line = self.update.to_json()
        last = {"dropped": line.pop("dropped")} if self.update.dropped else {}
        proof = {"theta": f"{self.theta:016x}", "live": f"{self.live:016x}"}
        return {**line, "lr": self.lr, "sigma": self.sigma, **proof, **last}

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> Generation:
        """The generation of a line. KeyError, TypeError or ValueError for what is none."""
        theta, live = int(line["theta"], 16), int(line["live"], 16)
        lr, sigma = (tuple(finite(name, value) for value in line[name]) for name in ("lr", "sigma"))
        return cls(Update.from_json(line), lr, sigma, theta, live)


class SealedLines:
    """A file of JSON objects, one a line, each sealed by a CRC; open for appending by one process at a time."""

    def __init__(self, path: Path, sync: bool = True):
        """Open `path` or make it, drop a torn last line, and hold a lock on it until it is closed.

        Args:
            path: The file.
            sync: Whether a line has reached the disk when `append` returns. False leaves that to the system: enough
                where the process may be killed, but not the machine, after which lines are dropped from the first
                damaged one on.

        Raises:
            UserError: Another process holds the file, or with sync a line is damaged.
        """
        self.path, self._sync = path, sync
        self._file = open(path, "ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{path} is being written by another process or Trainer: wait for it, close() it, or give another "
                "output folder"
            ) from None
        self.lines, whole = _read(path, strict=sync)
        self._file.truncate(whole)

    def append(self, line: dict[str, Any]) -> None:
        """Add one line.

        Raises:
            UserError: It is no JSON.
            OSError: As of a full disk. The file is as it was.
        """
        data = memoryview(sealed(line))
        before = os.fstat(self._file.fileno()).st_size
        try:
            while data:
                data = data[os.write(self._file.fileno(), data) :]
            if self._sync:
                os.fsync(self._file)
        except OSError as error:
            self._file.truncate(before)
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def clear(self) -> None:
        """Drop all lines."""
        self._file.truncate(0)
        self.lines = []

    def close(self) -> None:
        self._file.close()


def read_log(path: Path) -> tuple[dict[str, Any], list[Generation]]:
    """Header and generations of a run.log, also of one that is being written.

    Raises:
        UserError: It is damaged, of an older format, or no run.log.
    """
    try:
        lines, _ = _read(path, strict=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return parse_log(path, lines)


def read_journals(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of the journals of all workers that ever wrote into the folder; of which generation each is, it
    says.

    Raises:
        UserError: A line says no generation, member and rewards.
    """
    journals = {path: _read(path, strict=False)[0] for path in sorted(folder.glob("journal*"))}
    for path, lines in journals.items():
        for number, line in enumerate(lines, 1):
            if not _is_of_a_member(line):
                raise UserError(
                    f"{path} is damaged in line {number}, which is no member of a generation: remove that line"
                )
    return [line for lines in journals.values() for line in lines]


def parse_log(path: Path, lines: list[dict[str, Any]]) -> tuple[dict[str, Any], list[Generation]]:
    """The lines of a run.log as header, whose config has the last number of generations asked for, and generations.
    Errors as of `read_log`, where the lines do not fit."""
    if lines and lines[0].get("run") == 1:
        raise UserError(
            f"{path} was written by an older version, es_finetune {lines[0].get('es_finetune')}, whose option base is "
            "now called master: replay it with that version"
        )
    if not lines or lines[0].get("run") != FORMAT:
        raise UserError(f"{path} is no log of a run (format {FORMAT})")
    header, generations = lines[0], []
    if not isinstance(header.get("config"), dict):
        raise UserError(
            f"{path} is damaged in line 1: its header has no config; remove the file to begin the run again"
        )
    for number, line in enumerate(lines[1:], 2):
        try:
            if line.keys() == {"generations", "crc"}:
                header = {
                    **header,
                    "config": {**header["config"], "generations": whole("generations", line["generations"])},
                }
            else:
                generations.append(Generation.from_json(line))
        except (KeyError, TypeError, ValueError):
            what = "a second header" if "run" in line else "no generation"
            raise UserError(f"{path} is damaged in line {number}, which is {what}: remove that line") from None
    if [g.update.generation for g in generations] != list(range(len(generations))):
        raise UserError(f"{path} is damaged: its generations are not 0, 1, 2, ...")
    return header, generations


def sealed(line: dict[str, Any]) -> bytes:
    """The line as the file holds it. ValueError for what is no JSON."""
    try:
        body = json.dumps(line, allow_nan=False)[:-1].encode()
    except (TypeError, ValueError) as error:
        raise UserError(f"a line of the log can only hold JSON: {error}") from None
    return body + (_SEAL % zlib.crc32(body)).encode()


def is_begun(path: Path) -> bool:
    """Whether `path` is a log whose first line has been written; before that there is no run."""
    return path.exists() and bool(_read(path, strict=False)[0])


def _is_of_a_member(line: dict[str, Any]) -> bool:
    try:
        whole("generation", line["generation"])
        whole("member", line["member"])
        for reward in line["rewards"]:
            if reward is not None:
                finite("reward", reward)
    except (KeyError, TypeError, ValueError):
        return False
    return True


def _read(path: Path, strict: bool) -> tuple[list[dict[str, Any]], int]:
    """The lines of the file before the first that is not whole, and the length in bytes of what they take. With
    `strict` that one must be the last, and torn: without its newline."""
    data = path.read_bytes()
    lines: list[dict[str, Any]] = []
    at = 0
    while at < len(data):
        end = data.find(b"\n", at) + 1
        line = _opened(data[at:end]) if end else None
        if line is None:
            if strict and end:
                if not lines and not data.startswith(b'{"run": '):
                    raise UserError(f"{path} is no log of a run (format {FORMAT})")
                last = lines and end == len(data)
                remedy = (
                    "remove that line, and the run goes on from the one before"
                    if last
                    else "remove the file to begin the run again"
                )
                raise UserError(f"{path} is damaged in line {len(lines) + 1}: its CRC does not fit; {remedy}")
            break
        lines.append(line)
        at = end
    return lines, at


def _opened(line: bytes) -> dict[str, Any] | None:
    """The object that `sealed` made the line of; None for what it did not make."""
    body = line[:-_SEAL_LENGTH]
    if line != body + (_SEAL % zlib.crc32(body)).encode():
        return None
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
