"""Contract under test: whatever bytes a file of a run holds, a reader returns usable rows or raises UserError.

Files: any bytes; real ones, cut and changed anywhere; and lines whose CRC fits, of any JSON or real with one field
replaced, as whoever makes up a file can write them.
"""

import json
import math
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from es_finetune.config import TrainConfig
from es_finetune.errors import UserError
from es_finetune.optim.update import Update
from es_finetune.runs.files import generation_rows, read_rows
from es_finetune.runs.folder import is_begun
from es_finetune.runs.log import FORMAT, Generation, SealedLines, read_journals, read_log, sealed
from es_finetune.runs.replay import config_of
from es_finetune.tasks import load_task

many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

HEADER = {"run": FORMAT, "es_finetune": "1.0", "config": {"task": "countdown-char", "seed": 1}, "reward": None}
LOG = [
    HEADER,
    Generation(Update(0, (0.5, -0.5, 0.0), 2, 0.25, (2,)), (1e-3,), (0.1,), 2**64 - 1, 1).to_json(),
    {"generations": 9},
    Generation(Update(1, None, 3, 0.25), (1e-3, 2.0), (0.1, 0.2), 3, 4).to_json(),
]
JOURNAL = [
    {"generation": 2, "member": member, "rewards": [0.5, None, 1], "exact": None, "digest": "0" * 16, "tokens": 9}
    for member in range(2)
]
ROWS = [{"generation": 0, "reward": 0.5, "text": "\u2028"}, {"generation": 1, "reward": None}, {"generation": 2}]
RECORDS = [{"prompt": f"{n} + 1?", "answer": str(n + 1)} for n in range(6)]

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**400) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
DEEP = b"[" * 100_000


def seal(body):
    return body + b', "crc": "%08x"}\n' % zlib.crc32(body)


def one_field_replaced(lines):
    """One of the lines with a field, or one of a field's, replaced or removed."""

    @st.composite
    def replaced(draw):
        changed = json.loads(json.dumps(lines))
        line = draw(st.sampled_from(changed))
        inner = [value for value in line.values() if isinstance(value, dict)]
        line = draw(st.sampled_from([line, *inner]))
        name = draw(st.sampled_from(sorted(line)))
        if draw(st.booleans()):
            line[name] = draw(ANY_JSON)
        else:
            del line[name]
        return changed

    return replaced()


def damaged(data):
    """Real bytes, cut or changed."""
    cut = st.builds(lambda at: data[:at], st.integers(0, len(data)))
    put = st.builds(
        lambda at, what, over: data[:at] + what + data[at + over :],
        st.integers(0, len(data)),
        st.binary(max_size=4) | st.sampled_from([b"\n", b"\xff", b"\x00", DEEP, b"9" * 5000, b"NaN"]),
        st.integers(0, 9),
    )
    return cut | put


def sealed_files(lines):
    """Files of sealed lines."""
    body = st.binary(max_size=9) | st.sampled_from([b'{"a": ' + DEEP, b'{"a": ' + b"9" * 5000, b'{"a": "\xff"'])
    whole = st.lists(one_field_replaced(lines), min_size=1, max_size=2).map(lambda parts: sum(parts, []))
    made_up = st.lists(
        st.dictionaries(st.sampled_from([*lines[0], *lines[1], *lines[-1]]), ANY_JSON, max_size=4), max_size=3
    )
    files = (whole | made_up).map(lambda parts: b"".join(seal(json.dumps(line)[:-1].encode()) for line in parts))
    return st.binary(max_size=60) | damaged(b"".join(map(sealed, lines))) | files | body.map(seal)


def files_of_rows(rows):
    text = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    return st.binary(max_size=60) | damaged(text) | st.sampled_from([DEEP, DEEP + b"\n{}\n"])


@many
@given(data=sealed_files(LOG))
def test_run_log(tmp_path, data):
    path = tmp_path / "run.log"
    path.write_bytes(data)
    is_begun(path)
    try:
        header, generations = read_log(path)
    except UserError:
        return
    # What was read can be written again, and says the same
    path.write_bytes(sealed(header) + b"".join(sealed(generation.to_json()) for generation in generations))
    assert read_log(path)[1] == generations
    try:
        assert isinstance(config_of(header, tmp_path), TrainConfig)
    except UserError:
        pass


@many
@given(data=sealed_files(LOG), sync=st.booleans())
def test_the_log_is_opened_for_appending_or_left_alone(tmp_path, data, sync):
    path = tmp_path / "run.log"
    path.write_bytes(data)
    try:
        log = SealedLines(path, sync)
    except UserError:
        assert path.read_bytes() == data
        return
    before = path.read_bytes()
    assert data.startswith(before) and before.count(b"\n") == len(log.lines)
    log.append({"again": 1})
    log.close()
    log = SealedLines(path, sync)
    assert len(log.lines) == before.count(b"\n") + 1
    log.close()


@many
@given(data=sealed_files(JOURNAL))
def test_journal(tmp_path, data):
    (tmp_path / "journal").write_bytes(data)
    try:
        lines = read_journals(tmp_path)
    except UserError:
        return
    for line in lines:
        assert type(line["generation"]) is int and type(line["member"]) is int
        assert all(reward is None or math.isfinite(reward) for reward in line["rewards"])


@many
@given(data=files_of_rows(ROWS))
def test_rows(tmp_path, data):
    path = tmp_path / "evals.jsonl"
    path.write_bytes(data)
    for read in (read_rows, generation_rows):
        try:
            assert all(isinstance(row, dict) for row in read(path))
        except UserError:
            pass


@many
@given(data=files_of_rows(RECORDS))
def test_records_of_a_custom_task(tmp_path, data):
    path = tmp_path / "data.jsonl"
    path.write_bytes(data)
    try:
        task = load_task("custom", data=path, reward=lambda completion, record: 1.0)
    except UserError:
        return
    assert task.train and task.test


@pytest.mark.parametrize("lines, read", [(LOG, read_log), (ROWS, read_rows)])
def test_the_files_that_are_damaged_above_can_be_read(tmp_path, lines, read):
    path = tmp_path / "file"
    path.write_bytes(b"".join(map(sealed, lines)))
    assert read(path)
