"""Contract: `make` alone prints a line about every command a user may give, and changes nothing."""

import pathlib
import re
import subprocess

ROOT = pathlib.Path(__file__).parents[1]
PARTS = {"help", "test-ptx-nvcc", "test-ptx-triton"}  # of another command


def test_make_alone_lists_all_commands():
    page = subprocess.run(
        ["make", "-C", ROOT, "--no-print-directory"], capture_output=True, text=True, check=True
    ).stdout
    phony = re.search(r"^\.PHONY:((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), re.M)[1]
    commands = set(phony.replace("\\", "").split()) - PARTS
    assert {words.split()[-1] for words in re.findall(r"^  make( [a-z0-9 -]+?)  ", page, re.M)} == commands
