"""Contract: every link and path in the documentation leads somewhere; README stays short; the site has every page, and
its links lead inside it; the picture of the layers and the environment variables are those of the source."""

import pathlib
import re

import yaml

from docs import hooks

ROOT = pathlib.Path(__file__).parents[2]
FOLDERS = ("bench", "csrc", "docs", "es_kernels", "examples", "python", "tests")


def anchors(text):
    """Of a page's headings, as mkdocs and GitHub make them."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_every_link_leads_somewhere(pages):
    broken = []
    for page, text in pages.items():
        for target, anchor in re.findall(r"\]\(([^()\s#]*)(#[^()\s]*)?\)", text):
            if re.match(r"https?://|mailto:", target):
                continue
            path = (ROOT / page).parent / target if target else ROOT / page
            made = "<!-- made: " in text and not target
            if not path.exists() or anchor and not made and anchor[1:] not in anchors(path.read_text()):
                broken.append(f"{page}: {target}{anchor}")
    assert broken == []


def test_a_guide_links_its_example(pages):
    """The one that the list of examples names beside it."""
    rows = re.findall(r"^\| \[([\w.]+)\].*\(\.\./(docs/\w+/[\w-]+\.md)", pages["examples/README.md"], re.MULTILINE)
    assert len(rows) >= 6 and [row for row in rows if f"](../../examples/{row[0]})" not in pages[row[1]]] == []


def test_every_path_is_there(inline):
    """Of those that begin with a folder of the repository. Results of machines that were not measured yet may be
    missing."""
    path = re.compile(rf"(?:{'|'.join(FOLDERS)})/[\w./*-]+")
    missing = [(page, code) for page, code in inline if path.fullmatch(code) and not list(ROOT.glob(code.rstrip("/")))]
    assert missing == []


def test_readme_is_short(pages):
    assert len(pages["README.md"].splitlines()) <= 140


def test_no_page_tells_to_install_from_an_index_that_does_not_have_it(pages):
    assert [
        page
        for page, text in pages.items()
        if re.search(r"^[^#\n]*pip install '?es-kernels", text, re.MULTILINE) and "troubleshooting" not in page
    ] == []


def _leaves(nav):
    for entry in nav:
        for value in entry.values():
            yield from _leaves(value) if isinstance(value, list) else [value]


def test_the_site_has_every_page_once():
    nav = list(_leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(nav) == sorted(hooks.pages())


def test_links_lead_inside_the_site():
    text = "[a](../../bench/README.md#one-call) [b](../../bench/results) [c](../../csrc/es_kernels.h) [d](../index.md)"
    page = ROOT / "docs/develop/architecture.md"
    assert hooks.with_links_of_the_site(text, page, "develop/architecture.md") == (
        "[a](benchmarks.md#one-call) b [c](../source/csrc/es_kernels.h.txt) [d](../index.md)"
    )
    text = "[a](../docs/reference/files.md)"
    assert (
        hooks.with_links_of_the_site(text, ROOT / "bench/README.md", "develop/benchmarks.md")
        == "[a](../reference/files.md)"
    )


def test_the_pages_that_are_made():
    """From the parser, the config and the header."""
    commands = hooks.commands()
    assert "--population INT" in commands and "## calibrate" in commands
    assert "| `noise_rank` | int | `0` |  | rank of the noise" in hooks.config()
    assert "es_cuda_fingerprint" in hooks.header()


def test_the_picture_shows_the_layers():
    picture = re.findall(r'font-weight="600"[^>]*>([^<]+)<', (ROOT / "docs/layers.svg").read_text())
    layers = re.search(r"^layers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)[1]
    assert picture[:-2] == [layer for layer in re.findall(r'"(.+)"', layers) if layer != "__main__"]


def test_every_environment_variable_is_described(pages):
    described = set(re.findall(r"`([A-Z][A-Z_]+)`", pages["docs/reference/environment.md"]))
    sources = (
        "".join(path.read_text() for folder in ("es_kernels", "python") for path in (ROOT / folder).rglob("*.py"))
        + (ROOT / "setup.py").read_text()
    )
    read = set(re.findall(r"\benviron(?:\.get\(|\[)\"([A-Z_]+)\"", sources)) | set(
        re.findall(r"\"(CUDA_HOME)\" in os.environ", sources)
    )
    by_torchrun = {"RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID"}
    assert read - by_torchrun <= described
    beside = {"OMP_NUM_THREADS", "WANDB_PROJECT", "TRACKIO_PROJECT", "CUDA_VISIBLE_DEVICES"}
    assert described <= read | beside
