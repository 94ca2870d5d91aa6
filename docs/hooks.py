"""What the site has beside docs/**/*.md: pages that lie elsewhere or are made from the source, and files linked there.

mkdocs calls on_files and on_page_markdown (hooks, in mkdocs.yml). The pages are plain Markdown whose links work in a
checkout. In the site links out of docs/ become links inside it, so that it needs no network.
"""

import contextlib
import dataclasses
import io
import os
import re
from pathlib import Path
from unittest import mock

DOCS = Path(__file__).parent
ROOT = DOCS.parent
# Pages that stay where they are in the repository, and where they are in the site
ELSEWHERE = {
    "CHANGELOG.md": "develop/changelog.md",
    "CONTRIBUTING.md": "develop/contributing.md",
    "SECURITY.md": "reference/security.md",
    "bench/README.md": "develop/benchmarks.md",
    "es_kernels/NOISE.md": "reference/noise.md",
    "examples/README.md": "guides/examples.md",
}

LINK = re.compile(r"\]\(([^()\s#]+)(#[^()\s]*)?\)")
_MADE = re.compile(r"<!-- made: ([a-z]+) -->\n")


# --- pages made from the source ---------------------------------------------------------------------------------------


def commands() -> str:
    """The help of every command, as a terminal of 100 columns shows it."""
    from es_finetune.cli import COMMANDS, main

    parts = []
    for name in COMMANDS:
        out = io.StringIO()
        with mock.patch.dict(os.environ, COLUMNS="100"), contextlib.redirect_stdout(out):
            with contextlib.suppress(SystemExit):
                main([name, "--help"])
        parts.append(f"## {name}\n\n```text\n{out.getvalue()}```\n")
    return "\n".join(parts)


def config() -> str:
    """The fields of the dataclasses in config.py, by group."""
    from es_finetune import config as module

    parts = []
    for kind in (
        module.TrainConfig,
        module.EvalConfig,
        module.CalibrateConfig,
        module.ReplayConfig,
        module.ExportConfig,
    ):
        types = module.field_types(kind)
        parts.append(f"## {kind.__name__}\n\n{' '.join((kind.__doc__ or '').split())}\n")
        for group in module.GROUPS:
            rows = [
                f"| `{option.name}` | {_type(types[option.name], option)} | {_default(option)} | "
                f"{'yes' if option.metadata['resumable'] else ''} | {option.metadata['help']} |\n"
                for option in dataclasses.fields(kind)
                if option.metadata["group"] == group
            ]
            if rows:
                header = (
                    f"| {group} | type | default | may change on resume | meaning |\n| --- | --- | --- | --- | --- |\n"
                )
                parts.append(header + "".join(rows))
    return "\n".join(parts)


def _type(types: tuple[type, ...], option: dataclasses.Field) -> str:
    if option.metadata["choices"]:
        return ", ".join(f"`{choice}`" for choice in option.metadata["choices"])
    return " of ".join(kind.__name__ for kind in types if kind is not type(None))


def _default(option: dataclasses.Field) -> str:
    if option.default_factory is not dataclasses.MISSING:
        return f"`{option.default_factory()}`"
    return "" if option.default in (None, dataclasses.MISSING) else f"`{option.default!r}`"


def header() -> str:
    """The C header, which is its own manual."""
    return f"```c\n{(ROOT / 'csrc/es_kernels.h').read_text(encoding='utf-8')}```\n"


MADE = {"commands": commands, "config": config, "header": header}


# --- links ------------------------------------------------------------------------------------------------------------


def pages() -> dict[str, Path]:
    """Of every page its place in the site, and its file."""
    own = {path.relative_to(DOCS).as_posix(): path for path in sorted(DOCS.rglob("*.md"))}
    return own | {place: ROOT / source for source, place in ELSEWHERE.items()}


def linked(path: Path) -> list[Path]:
    """The files and folders to which the relative links of a page lead."""
    return [(path.parent / target).resolve() for target, _ in LINK.findall(path.read_text()) if "://" not in target]


def in_site(target: Path) -> str | None:
    """Where the site has a file of the repository; None for a folder, which it has not."""
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    name = target.relative_to(ROOT).as_posix()
    if name == "README.md":
        return "index.md"
    return ELSEWHERE.get(
        name, f"source/{name}{'' if target.suffix == '.json' else '.txt'}" if target.is_file() else None
    )


def with_links_of_the_site(text: str, path: Path, place: str) -> str:
    """A page's Markdown with its relative links as they lead inside the site."""

    def replaced(match: re.Match) -> str:
        if "://" in match[1] or match[1].startswith("mailto:"):
            return match[0]
        where = in_site((path.parent / match[1]).resolve())
        return "]()" if where is None else f"]({os.path.relpath(where, Path(place).parent)}{match[2] or ''})"

    return re.sub(r"\[([^\[\]]*)\]\(\)", r"\1", LINK.sub(replaced, text))


# --- what mkdocs calls ------------------------------------------------------------------------------------------------


def on_files(files, config):
    from mkdocs.structure.files import File

    for source, place in ELSEWHERE.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text(encoding="utf-8")))
    for target in sorted({target for path in pages().values() for target in linked(path)}):
        where = in_site(target)
        if where is not None and where.startswith("source/"):
            files.append(File.generated(config, where, abs_src_path=str(target)))
    return files


def on_page_markdown(markdown, page, config, files):
    place = page.file.src_uri
    text = with_links_of_the_site(markdown, pages()[place], place)
    return _MADE.sub(lambda match: MADE[match[1]](), text)
