"""Contract: versions and limits that the pages beside the code name are those of the code: what stays, the changelog,
SECURITY.md, CITATION.cff, the issue form, the flags of a resumed run."""

import pathlib
import re

import yaml

import es_kernels
from es_finetune.config import RESUMABLE, TrainConfig
from es_finetune.runs import log
from es_finetune.tasks import reward_process
from es_kernels import native

ROOT = pathlib.Path(__file__).parents[2]


def test_versions(pages):
    noise, form, abi = es_kernels.noise.VERSION, log.FORMAT, native.ABI
    page = pages["docs/develop/contracts.md"]
    assert re.findall(r"\| (?:noise version|format|ABI) (\d+) \|", page) == [str(noise), str(form), str(abi)]
    newest = pages["CHANGELOG.md"].split("\n## ")[1]
    assert newest.startswith(es_kernels.__version__)
    assert f"Noise version {noise}, run.log format {form}, C ABI {abi}." in newest


def test_flags_that_may_change_when_a_run_is_resumed(pages):
    [listed] = re.findall(r"These may: (.*)\n", pages["docs/guides/resume.md"])
    assert set(re.findall(r"`--(\w+)`", listed)) == RESUMABLE - {"resume", "output"}


def test_limits_of_a_reward(pages):
    text = pages["SECURITY.md"]
    assert f"{reward_process.MEMORY_BYTES >> 30} GiB of address space" in text
    assert f"| a reply | {reward_process.MAX_REPLY >> 20} MiB |" in text
    assert f"Importing the module may take {reward_process.LOAD_SECONDS:.0f} seconds" in text
    assert f"`--time_limit` seconds a call, {TrainConfig().time_limit:g} if not given" in text


def test_the_citation():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= cff.keys()
    assert (cff["version"], cff["license"]) == (es_kernels.__version__, "Apache-2.0")
    assert cff["references"][0]["url"] == "https://arxiv.org/abs/2509.24372"


def test_the_issue_form():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/problem.yml").read_text())
    asked = {field["id"]: field for field in form["body"] if field["type"] != "markdown"}
    assert asked["environment"]["validations"]["required"]
    assert "`es-finetune env`" in asked["environment"]["attributes"]["label"]
