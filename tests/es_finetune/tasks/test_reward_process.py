"""Contract under test: a function in a process of its own (es_finetune.tasks.reward_process).

- It gets its arguments and gives its value exactly, whatever the text; what it prints or reads cannot come between.
- Raising, ending its process, a crash, too much memory and too much time are each a RewardError of one line for that
  one answer; the next one is answered. A time limit is kept, and nothing that was started outlives it, nor the parent.
- A reply belongs to its request. A restarted child has the code of the first one, or the run ends.
- The child has no GPU, no torch and a fixed hash seed. What cannot be loaded is a UserError at once.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from es_finetune.errors import RewardFailed, UserError
from es_finetune.tasks import reward_process
from es_finetune.tasks.reward_process import RewardError, RewardProcess
from es_finetune.tasks.sandbox import RewardTypeError

REWARDS = """
import ctypes, os, subprocess, sys, time

print("printed while importing")

def echo(completion, item):
    print(completion.encode("utf-8", "replace")[:10])
    return [completion, item]

def behave(completion, item):
    if completion == "exit":
        os._exit(3)
    if completion == "crash":
        ctypes.string_at(0)
    if completion == "memory":
        return len(bytearray(worker_memory * 2))
    if completion == "raise":
        raise KeyError("two\\nlines \\ud800")
    if completion == "leave":
        sys.exit(4)
    if completion == "input":
        return input()
    if completion == "descriptors":
        os.write(1, b"{}\\n")
        return len(os.read(0, 10))
    if completion == "sleep":
        time.sleep(60)
    if completion == "no GIL":  # one long computation in C, during which no other thread of the child runs
        9 ** 9 ** 9
    if completion == "child":
        with open(item["file"], "w") as file:
            file.write(str(subprocess.Popen(["sleep", "60"]).pid))
        time.sleep(60)
    if completion == "object":
        return object()
    if completion == "environment":
        heavy = sorted({"torch", "numpy", "es_finetune"} & set(sys.modules))
        environment = [os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"], hash("a"), heavy]
        return [*environment, os.getpid(), sys.argv]
    return len(completion)

worker_memory = 4 << 30
behave.floor = -2.5
number = 3

def one(completion):
    return 1
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "rewards.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture(scope="module")
def behave(file):
    process = RewardProcess(f"{file}:behave", 20.0)
    yield process
    process.close()


def alive(pid: int) -> bool:
    """False for a zombie, too: where nobody reaps orphans, that is all that is left of one."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def gone(pid: int) -> bool:
    end = time.monotonic() + 30  # half of what it would sleep
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not alive(pid)


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def echo(file):
    return RewardProcess(f"{file}:echo", 20.0)


@settings(deadline=None, max_examples=50)
@given(
    st.text(st.characters(exclude_categories=())),
    st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()),
)
def test_arguments_and_values_pass_unchanged(echo, completion, item):
    assert echo(completion, item) == [completion, item]


@pytest.mark.parametrize(
    "text", ["", "\n", "\x00", "\ud800", "\u2028", "(" * 1_000_000], ids=lambda text: ascii(text[:10])
)
def test_any_text_passes(echo, text):
    assert echo(text, {"text": text}) == [text, {"text": text}]


def test_the_function_is_kept_from_the_pipes(behave):
    assert behave("descriptors", {}) == 0
    with pytest.raises(RewardError, match="EOFError"):
        behave("input", {})
    assert behave("four", {}) == 4


def test_the_child_is_plain(behave):
    visible, threads, hashed, heavy, pid, arguments = behave("environment", {})
    assert (visible, threads, heavy, len(arguments)) == ("", "1", [], 1) and pid != os.getpid()
    again = RewardProcess(behave_target(behave), 20.0)
    assert again("environment", {})[2] == hashed  # what depends on the order of a set is the same in every child
    assert behave.attributes["floor"] == -2.5


def behave_target(process):
    return f"{process._hello['where']}:{process._hello['function']}"


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "completion, problem",
    [
        ("exit", "its process ended with exit code 3"),
        ("crash", "its process was killed by SIGSEGV"),
        ("memory", r"MemoryError \(rewards.py:\d+\)"),
        ("raise", r"KeyError: '.*' \(rewards.py:\d+\)"),
        ("leave", r"SystemExit: 4 \(rewards.py:\d+\)"),
    ],
)
def test_a_failure_is_one_line_and_one_answer(behave, completion, problem):
    with pytest.raises(RewardError, match=f"^{problem}$") as raised:
        behave(completion, {})
    assert str(raised.value).isprintable()
    assert behave("four", {}) == 4


def test_a_value_of_the_wrong_type_is_told_from_an_exception(behave):
    with pytest.raises(RewardTypeError, match="of type object, not a number"):
        behave("object", {})


@pytest.mark.parametrize("completion", ["sleep", "no GIL"])
def test_the_time_limit_is_kept(file, completion):
    process = RewardProcess(f"{file}:behave", 0.3)
    for _ in range(2):
        pid = process._process.pid
        start = time.perf_counter()
        with pytest.raises(RewardError, match=r"^no result within 0.3 s, killed$"):
            process(completion, {})
        # Not before; and not by itself, which takes a minute
        assert time.perf_counter() - start > 0.29 and not alive(pid)
        assert process("four", {}) == 4


def test_a_long_request_cannot_block_the_parent(file):
    process = RewardProcess(f"{file}:behave", 0.3)
    os.kill(process._process.pid, signal.SIGSTOP)  # reads nothing, and the pipe holds 64 KB
    with pytest.raises(RewardError, match="no result within"):
        process("x" * 1_000_000, {})
    assert process("four", {}) == 4


def test_what_the_function_started_is_killed_with_it(file, tmp_path):
    process = RewardProcess(f"{file}:behave", 1.0)
    with pytest.raises(RewardError, match="no result"):
        process("child", {"file": str(tmp_path / "pid")})
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_child_that_died_between_answers_is_replaced_unnoticed(file):
    process = RewardProcess(f"{file}:behave", 20.0)
    os.kill(process._process.pid, signal.SIGKILL)
    time.sleep(0.2)
    assert process("four", {}) == 4


def test_an_interrupted_answer_is_not_taken_for_the_next(file):
    process = RewardProcess(f"{file}:behave", 20.0)

    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            process("sleep", {})
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert process("four", {}) == 4


def test_a_late_reply_is_never_taken_for_the_next(file, monkeypatch):
    process = RewardProcess(f"{file}:behave", 20.0)
    monkeypatch.setattr(reward_process, "_ended", lambda process: False)  # which would notice one that has come already
    for _ in range(2):  # requests that nobody waits for
        process._asked += 1
        os.write(process._process.stdin.fileno(), json.dumps([process._asked, ["late reply", {}]]).encode() + b"\n")
    pid = process._process.pid
    assert process("four", {}) == 4 and process("seven!!", {}) == 7
    process._asked -= 2  # replies that nobody has asked for yet
    os.write(process._process.stdin.fileno(), b'[99, ["five!", {}]]\n')
    with pytest.raises(RewardError, match="no reply"):
        process("four", {})
    assert process._process is None and not alive(pid)
    assert process("four", {}) == 4


def test_a_time_limit_of_ages_is_one(file):
    process = RewardProcess(f"{file}:behave", 1e300)
    assert process("four", {}) == 4


def test_replies_are_bounded(tmp_path, monkeypatch):
    (tmp_path / "long.py").write_text("def f(completion, item):\n    return 'x' * item['count']\n")
    monkeypatch.setattr(reward_process, "MAX_REPLY", 1000)
    process = RewardProcess(f"{tmp_path / 'long.py'}:f", 5.0)
    with pytest.raises(RewardError, match="no reply"):
        process("", {"count": 2000})
    assert process("", {"count": 3}) == "xxx"


REPLIES = st.one_of(
    st.binary(max_size=20),
    st.builds(
        lambda number, reply: json.dumps([number, reply]).encode(),
        st.integers(0, 5) | st.none() | st.booleans(),
        st.dictionaries(
            st.sampled_from(["value", "error", "kind", "x"]), st.none() | st.integers() | st.text(max_size=3)
        )
        | st.none(),
    ),
    st.just(b"[" * 100_000),
)


@settings(deadline=None)
@given(st.lists(REPLIES, max_size=4))
def test_whatever_comes_back_is_a_reply_or_refused(lines):
    """Code in the child can find the pipe."""
    (there, to), (back, here) = os.pipe(), os.pipe()
    with open(there, "rb"), open(to, "wb", 0) as stdin, open(back, "rb", 0) as stdout:
        with open(here, "wb", 0) as child:
            fcntl.fcntl(child, fcntl.F_SETPIPE_SZ, 1 << 20)
            child.write(b"\n".join(lines) + b"\n")
        try:
            reply = reward_process._exchange(types.SimpleNamespace(stdin=stdin, stdout=stdout), b"asked\n", 3, 20.0)
        except (EOFError, ValueError, RecursionError):
            return
        assert reply.keys() & {"value", "error"}


# --- the code of a new child ------------------------------------------------------------------------------------------


def test_a_function_that_was_changed_is_not_called(tmp_path):
    """The child is started again after every answer that took too long: by then somebody may have edited the file."""
    code = "def f(completion, item):\n    return 1\n"
    reward = tmp_path / "reward.py"
    reward.write_text(code)
    process = RewardProcess(f"{reward}:f", 5.0)
    process.close()
    assert process("", {}) == 1
    for changed in (code.replace("1", "2"), "def f(:"):
        process.close()
        reward.write_text(changed)
        for _ in range(2):
            with pytest.raises(
                RewardFailed,
                match="reward '.*reward.py:f' was changed.* while answers were scored by it: put it back as it was",
            ):
                process("", {})
    reward.write_text(code)
    assert process("", {}) == 1


# --- the end ----------------------------------------------------------------------------------------------------------

PARENT = """
import sys
from es_finetune.tasks.reward_process import RewardProcess
process = RewardProcess(sys.argv[1], 60.0)
print(process._process.pid, flush=True)
process(sys.argv[2], {})
"""


@pytest.mark.parametrize("completion", ["no GIL", "sleep"])
def test_a_killed_parent_leaves_no_child(file, completion):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, f"{file}:behave", completion],
        stdout=subprocess.PIPE,
        text=True,
    )
    pid = int(parent.stdout.readline())
    time.sleep(0.3)
    assert alive(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(pid)


def test_a_parent_that_ends_leaves_no_child(file):
    done = subprocess.run(
        [sys.executable, "-c", PARENT, f"{file}:behave", "four"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0 and gone(int(done.stdout))
    assert "printed while importing" in done.stderr


def test_closed_or_forgotten_it_leaves_no_child(file):
    process = RewardProcess(f"{file}:behave", 20.0)
    pid = process._process.pid
    process.close()
    process.close()
    assert not alive(pid)
    assert process("four", {}) == 4
    pid = process._process.pid
    del process
    assert not alive(pid)


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target, problem",
    [
        ("nothing", "names no function; write module:function or file.py:function"),
        ("{folder}/nothing.py:f", "there is no file"),
        ("{file}:nothing", "rewards.py has no function 'nothing'"),
        ("{file}:number", "'number' is no function but 3"),
        ("{file}:one", r"is called as reward\(completion, item\), but its signature is \(completion\)"),
        ("no_such_module:f", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("{folder}/broken.py:f", r"cannot be imported: SyntaxError: .*\(broken.py, line 2\)"),
        ("{folder}/leaves.py:f", r"cannot be imported: SystemExit: bye \(leaves.py:1\)"),
        ("{folder}/dies.py:f", "its process ended with exit code 7"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(file, tmp_path, target, problem):
    (tmp_path / "broken.py").write_text("\ndef f(:\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit('bye')\n")
    (tmp_path / "dies.py").write_text("import os\nos._exit(7)\n")
    with pytest.raises(UserError, match=problem) as raised:
        RewardProcess(target.format(file=file, folder=tmp_path), 5.0)
    assert "\n" not in str(raised.value)


def test_a_module_and_its_neighbours_are_found(tmp_path, monkeypatch):
    (tmp_path / "neighbour.py").write_text("def f(completion, item):\n    return 7\n")
    (tmp_path / "first.py").write_text("from neighbour import f\n")
    assert RewardProcess(f"{tmp_path / 'first.py'}:f", 5.0)("", {}) == 7
    monkeypatch.syspath_prepend(tmp_path)
    assert RewardProcess("neighbour:f", 5.0)("", {}) == 7
    monkeypatch.chdir(tmp_path)
    process = RewardProcess("first.py:f", 5.0)
    monkeypatch.chdir("/")
    process.close()
    assert process("", {}) == 7
