"""GGUF files: read by transformers, with every weight unpacked into the dtype that is asked for."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch

from es_finetune.errors import UserError, did_you_mean, require

SUFFIX = ".gguf"


class GGUF(NamedTuple):
    """A file that holds a model and its tokenizer."""

    folder: str  # or the name of a hub's repository
    file: str

    @property
    def path(self) -> str | None:
        """Absolute; None for a file of the hub."""
        path = Path(self.folder, self.file)
        return str(path.resolve()) if path.is_file() else None

    @property
    def options(self) -> dict[str, str]:
        """For `from_pretrained`, beside `folder`. A local file is given by its absolute path: transformers would take
        one of its name in the working directory before the folder's."""
        return {"gguf_file": self.path or self.file}

    def digest(self) -> str:
        """SHA-256 of the file, as hubs show it."""
        from transformers.utils import cached_file

        path = cached_file(self.folder, self.options["gguf_file"])  # of the hub: loaded before
        sha256 = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(2**20):
                sha256.update(block)
        return sha256.hexdigest()


def gguf_of(name: str) -> GGUF | None:
    """What FILE.gguf or FOLDER:FILE.gguf names, where FOLDER may also be a repository of the hub; None for other names.

    Raises:
        UserError: The file does not exist, or the packages that read it are not installed.
    """
    if not name.endswith(SUFFIX):
        return None
    folder, colon, file = name.rpartition(":")
    gguf = GGUF(folder, file) if colon else GGUF(str(Path(name).parent), Path(name).name)
    if (not colon or Path(folder).is_dir()) and not Path(gguf.folder, gguf.file).is_file():
        beside = [path.name for path in Path(gguf.folder).glob(f"*{SUFFIX}")]
        raise UserError(f"the model's file {name} does not exist{did_you_mean(gguf.file, beside)}")
    require(f"model {name}", "gguf", "gguf", "accelerate")
    return gguf


def unpacked() -> dict[str, Any]:
    """The option of `from_pretrained` that unpacks all weights. Releases of transformers without it always do."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def forget_quantization(model: torch.nn.Module) -> None:
    """Take away what says that the weights were packed: with it `save_pretrained` refuses."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
