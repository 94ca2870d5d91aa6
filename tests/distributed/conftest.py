import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

OPTIONS = {
    "generations": 20,
    "population": 8,
    "prompts": 16,
    "eval_items": 24,
    "eval_every": 0,
    "report_to": ["none"],
    "save_model": False,
}
SCRIPT = pathlib.Path(__file__).parent / "run.py"


class Run:
    """One run in a folder of its own, started as a user would: under torchrun with so many ranks, or alone."""

    def __init__(self, folder, **options):
        self.folder, self.options = folder, {**OPTIONS, "output": str(folder), **options}

    def start(self, ranks=0, restarts=0, environment=None):
        path = pathlib.Path(f"{self.folder}.json")
        path.write_text(json.dumps(self.options))
        launcher = (
            [
                "-m",
                "torch.distributed.run",
                "--nproc-per-node",
                str(ranks),
                "--max-restarts",
                str(restarts),
                "--standalone",
            ]
            if ranks
            else []
        )
        environment = {
            **os.environ,
            **(environment or {}),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(map(str, sys.path)),
        }
        with open(f"{self.folder}.out", "a") as out:
            return subprocess.Popen(
                [sys.executable, *launcher, str(SCRIPT), str(path)],
                stdout=out,
                stderr=out,
                env=environment,
                start_new_session=True,
            )

    def finish(self, process, seconds=120):
        """The exit code. Whatever it has started ends with it."""
        try:
            return process.wait(seconds)
        finally:
            kill_group(process)

    def wait_until(self, what, process=None, seconds=120):
        """Until what() is true; whether it came to that before `process` ended."""
        end = time.monotonic() + seconds
        while not what():
            if process is not None and process.poll() is not None:
                return False
            assert time.monotonic() < end, f"waited in vain; {self.output}"
            time.sleep(0.01)
        return True

    def __call__(self, ranks=0):
        assert self.finish(self.start(ranks)) == 0, self.output
        return self.summary

    @property
    def output(self):
        return pathlib.Path(f"{self.folder}.out").read_text()[-6000:]

    @property
    def summary(self):
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def scored(self):
        """(generation, member) of each member that some worker finished, in the order of finishing. A worker that is
        killed between its line of the journal and the note of it (run.py) leaves that one out."""
        path = pathlib.Path(f"{self.folder}.scored")
        return [tuple(map(int, line.split())) for line in path.read_text().splitlines()] if path.exists() else []

    def assert_none_scored_twice(self, alone):
        """That no member was finished again after workers were killed, each of whom may have left out one."""
        assert [member for member, times in Counter(self.scored).items() if times > 1] == []
        left_out = set(alone.scored) - set(self.scored)
        assert set(self.scored) <= set(alone.scored) and len(left_out) < len(self.pids), left_out

    @property
    def pids(self):
        """(process, rank) of all that were ever started."""
        path = pathlib.Path(f"{self.folder}.pids")
        return [tuple(map(int, line.split())) for line in path.read_text().splitlines()] if path.exists() else []


def kill_group(process):
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


@pytest.fixture
def run(tmp_path):
    return lambda name="run", **options: Run(tmp_path / name, **options)


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """The run of one process that nothing disturbs."""
    single = Run(tmp_path_factory.mktemp("alone") / "run")
    single()
    return single
