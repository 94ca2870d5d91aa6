"""Contract: every table of the README is what bench/readme.py makes of the committed results."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_tables_come_from_results():
    run = subprocess.run([sys.executable, ROOT / "bench/readme.py", "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
