"""Contract: bench/speed/members.py writes whole rows of every way to ask several members, and none of a model for which
members in one batch are not what they are one by one."""

import json
import sys

import pytest

from bench.speed import members
from es_finetune.models.members import Members

pytestmark = pytest.mark.usefixtures("little_garbage")


@pytest.fixture
def small(monkeypatch, tmp_path):
    """main() on the embedded model, two members; returns a function that runs it and reads the file."""
    monkeypatch.setitem(members.CASES, "cpu", {"embedded": [(2, 3, 5, 2, True)]})
    monkeypatch.setattr(sys, "argv", ["members.py", "--device", "cpu", "--out", str(tmp_path)])

    def run():
        members.main()
        return json.loads((tmp_path / "members-cpu.json").read_text())

    return run


def test_rows_are_whole(small):
    content = small()
    (row,) = content["rows"]
    assert set(row["ways"]) == {"plain", "one batch", "one by one", "PEFT"} and content["machine"]["processor"]
    for way, of in row["ways"].items():
        assert of["p20"] <= of["seconds"] <= of["p80"]
        assert of["tokens_per_s"] == pytest.approx(2 * 3 * 2 / of["seconds"])
        if way in ("one by one", "PEFT"):
            assert row[f"{way} takes"] == pytest.approx(of["seconds"] / row["ways"]["one batch"]["seconds"])
    whole = {way: row["ways"][way]["seconds"] + row["update"]["seconds"] for way in ("one batch", "one by one")}
    assert row["generation one by one takes"] == pytest.approx(whole["one by one"] / whole["one batch"])
    assert row["share_of_plain"] == pytest.approx(row["ways"]["plain"]["seconds"] / row["ways"]["one batch"]["seconds"])


def test_other_logits_than_one_by_one_are_no_figure(small, monkeypatch, tmp_path):
    places = Members.__init__

    def half(self, *arguments, **options):
        places(self, *arguments, **options)
        self._places = self._places[::2]  # some layers forget their members

    monkeypatch.setattr(Members, "__init__", half)
    with pytest.raises(SystemExit, match="embedded, 2 members: .* other logits"):
        small()
    assert not (tmp_path / "members-cpu.json").exists()
