"""Contract: what the documentation tells a user to type is understood: every es-finetune command with its flags, every
make target, every `python -m` module; and every flag that the text names exists."""

import dataclasses
import importlib.util
import pathlib
import re
import shlex

import pytest

from es_finetune import cli, config

ROOT = pathlib.Path(__file__).parents[2]
KINDS = [getattr(config, command.config) for command in cli.COMMANDS.values() if command.config]
FLAGS = {field.name for kind in KINDS for field in dataclasses.fields(kind)} | {"config", "quiet", "debug", "help"}
_STANDS_FOR = {"NAME": "countdown-qwen2.5-1.5b", "S": "1", "K": "1"}  # where a name or number is read at once
OF_OTHERS = {"max_restarts", "nproc_per_node"}  # torchrun's


@pytest.fixture(scope="session")
def lines(blocks, inline):
    """(page, words) of each shell command: of bash blocks, and in backticks where it begins as one."""
    commands = [
        (block.page, line)
        for block in blocks
        if block.language == "bash"
        for line in re.sub(r"\\\n", " ", block.text).splitlines()
    ]
    commands += [
        (page, code) for page, code in inline if re.match(r"(\S+=\S+ )*(make|python|torchrun|es-finetune) ", code)
    ]
    words = [(page, shlex.split(line, comments=True)) for page, line in commands]
    return [(page, of) for page, of in words if of]


def arguments(words):
    """Those of es-finetune, or None."""
    for place, word in enumerate(words):
        if word.rpartition("/")[2] == "es-finetune" or words[place - 1 : place + 1] == ["-m", "es_finetune"]:
            given = [word for word in words[place + 1 :] if word != "..."]
            return [_STANDS_FOR.get(word, word) for word in given]
    return None


def test_every_es_finetune_command_is_understood(lines):
    seen = 0
    for page, words in lines:
        given = arguments(words)
        if not given or given[-1] in ("--help", "flags"):
            continue
        seen += 1
        options = cli._parse(given)
        if options.pop("command") == "train" and "..." not in words:
            try:
                config.TrainConfig(**{k: v for k, v in options.items() if k not in ("quiet", "debug")})
            except ValueError as error:
                pytest.fail(f"{page}: {shlex.join(words)}: {error}")
    assert seen > 30


def test_every_make_target_is_there(lines):
    phony = re.search(r"^\.PHONY:((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    asked = {
        (page, word)
        for page, words in lines
        if "make" in words
        for word in words[words.index("make") + 1 :]
        if "=" not in word
    }
    assert len(asked) > 5
    assert {word for _, word in asked} <= set(phony.replace("\\", "").split())


def test_every_module_of_ours_is_there(lines):
    text = "\n".join(" ".join(words) for _, words in lines)
    modules = set(re.findall(r"-m ((?:bench|es_kernels|es_finetune)[\w.]*)", text))
    assert len(modules) > 3
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []


def test_every_flag_in_the_text_is_there(inline):
    """On the pages about es-finetune: others name flags of compilers and scripts."""
    named = {
        (page, flag.replace("-", "_"))
        for page, code in inline
        if page == "README.md" or page.startswith(("docs/guides", "docs/workers", "docs/quickstart"))
        for flag in re.findall(r"(?:^|\s)--([a-z][\w-]*)", code)
    }
    assert len(named) > 30
    assert {(page, flag) for page, flag in named if flag not in FLAGS | OF_OTHERS} == set()
