"""Contract under test: run.log and journal.

What was appended is read back exactly, f32 and f64 values included. A file cut at any byte loses at most its last line
and can be appended to again; any other damage is refused by line. A write that fails, as on a full disk, leaves the
file as it was. Two processes never write one file.
"""

import errno
import math
import os
import random

import numpy as np
import pytest

from es_finetune.optim.update import Update
from es_finetune.runs.log import FORMAT, Generation, SealedLines, read_log, sealed


def generation(number, n=6, reward=math.pi):
    values = np.random.default_rng(number).normal(size=n).astype(np.float32)
    z = None if number == 1 else tuple(values.astype(float).tolist())
    update = Update(number, z, n, reward)
    return Generation(update, (1e-3 / 3, 5e-324), (0.1,), 2**64 - 1 - number, number)


@pytest.fixture
def path(tmp_path):
    log = SealedLines(tmp_path / "run.log")
    log.append({"run": FORMAT, "config": {"sigma": 1e-3}, "name": "Zürich \u2028 \U0001f600"})
    for number in range(4):
        log.append(generation(number).to_json())
    log.close()
    return tmp_path / "run.log"


def test_what_was_appended_is_read_back_exactly(path):
    header, generations = read_log(path)
    assert header["config"] == {"sigma": 1e-3} and header["name"] == "Zürich \u2028 \U0001f600"
    assert generations == [generation(number) for number in range(4)]


def test_a_line_is_what_it_always_was():
    """Keys, their order and the form of each value: the line that a log of this format has."""
    z = (0.5, -1.25, 0.0)
    line = Generation(Update(7, z, 2, 0.25, (2,)), (5e-4,), (0.001, 0.1), 2**64 - 1, 1).to_json()
    assert sealed(line) == (
        b'{"generation": 7, "z": "AAAAPwAAoL8AAAAA", "scored": 2, "reward": 0.25, "lr": [0.0005], '
        b'"sigma": [0.001, 0.1], "theta": "ffffffffffffffff", "live": "0000000000000001", '
        b'"dropped": [2], "crc": "6e3511ea"}\n'
    )
    assert Generation.from_json(line) == Generation(Update(7, z, 2, 0.25, (2,)), (5e-4,), (0.001, 0.1), 2**64 - 1, 1)
    assert [*Generation(Update(7, None, 3, 0.25), (5e-4,), (0.1,), 0, 1).to_json()] == [
        "generation", "z", "scored", "reward", "lr", "sigma", "theta", "live"
    ]  # fmt: skip


def test_cut_anywhere_it_loses_the_torn_line_only_and_goes_on(path):
    data = path.read_bytes()
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        whole = data[:length].count(b"\n")
        log = SealedLines(path, sync=False)
        assert len(log.lines) == whole
        assert path.read_bytes() == b"".join(data.splitlines(keepends=True)[:whole])
        log.append({"again": length})
        log.close()
        log = SealedLines(path, sync=False)
        assert [line.get("again") for line in log.lines] == [None] * whole + [length]
        log.close()


def test_what_a_machine_leaves_after_its_power_failed_is_a_torn_line_too(path):
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(300))
    assert len(read_log(path)[1]) == 4


def test_any_other_damage_is_refused_by_line(path):
    """A bit anywhere but in the last newline, without which the last line is a torn one."""
    data = bytearray(path.read_bytes())
    lines = data.splitlines(keepends=True)
    draws, last = random.Random(0), len(data) - len(lines[-1])
    places = draws.sample(range(last), 60) + draws.sample(range(last, len(data) - 1), 20)
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged in line|no log of a run"):
            read_log(path)
        with pytest.raises(ValueError, match="is damaged in line|no log of a run"):
            SealedLines(path)
        assert path.read_bytes() == damaged
    assert damaged[:place] == data[:place]
    with pytest.raises(
        ValueError,
        match="is damaged in line 5: its CRC does not fit; remove that line, and the run goes on from the one before",
    ):
        read_log(path)
    path.write_bytes(b"".join(lines[:-1]))
    assert len(read_log(path)[1]) == 3
    path.write_bytes(b"".join([*lines[:2], *lines[3:]]))
    with pytest.raises(ValueError, match="generations are not 0, 1, 2"):
        read_log(path)


def test_a_line_out_of_place_is_refused_by_line(path):
    lines = path.read_bytes().splitlines(keepends=True)
    for line, words in (
        (lines[0], "line 3, which is a second header"),
        (sealed({"generation": 1, "member": 0}), "line 3, which is no generation"),
    ):
        path.write_bytes(b"".join([*lines[:2], line, *lines[2:]]))
        with pytest.raises(ValueError, match=f"run.log is damaged in {words}: remove that line"):
            read_log(path)


def test_the_last_number_of_generations_counts(path):
    before = read_log(path)
    log = SealedLines(path)
    for line in ({"generations": 5}, generation(4).to_json(), {"generations": 9}):
        log.append(line)
    log.close()
    header, generations = read_log(path)
    assert header == {**before[0], "config": {"sigma": 1e-3, "generations": 9}}
    assert generations == [*before[1], generation(4)]


def test_what_is_no_json_is_refused_with_nothing_written(path):
    log, before = SealedLines(path), path.read_bytes()
    for value in (math.nan, np.int64(1), object()):
        with pytest.raises(ValueError, match="a line of the log can only hold JSON"):
            log.append({"value": value})
    assert path.read_bytes() == before
    log.close()


def test_what_is_no_log_is_refused(tmp_path):
    for content in (b"", b"{}\n", b"\x00" * 50):
        (tmp_path / "run.log").write_bytes(content)
        with pytest.raises(ValueError, match="no log of a run"):
            read_log(tmp_path / "run.log")
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_log(tmp_path / "missing")


def test_five_hundred_generations_of_thirty_members_take_less_than_300_kB(tmp_path):
    log = SealedLines(tmp_path / "run.log", sync=False)
    for number in range(2, 502):
        log.append(
            generation(number, 30, reward=-math.pi / 1e5)
            ._replace(lr=(5e-4 / 3,), theta=2**64 - 1, live=2**64 - 1)
            .to_json()
        )
    assert (tmp_path / "run.log").stat().st_size < 250_000  # the header's kilobyte beside it


def test_a_write_that_fails_leaves_the_file_as_it_was(path, monkeypatch):
    before = path.read_bytes()
    log = SealedLines(path)
    real, calls = os.write, []

    def half_then_full(file, data):
        calls.append(1)
        if len(calls) == 1:
            return real(file, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", half_then_full)
    with pytest.raises(OSError, match="No space left on device: .*run.log"):
        log.append(generation(4).to_json())
    monkeypatch.undo()
    assert path.read_bytes() == before
    log.append(generation(4).to_json())
    assert len(read_log(path)[1]) == 5
    log.close()


def test_a_second_writer_is_refused(path):
    log = SealedLines(path)
    with pytest.raises(ValueError, match="is being written by another process"):
        SealedLines(path)
    log.close()
    SealedLines(path).close()
