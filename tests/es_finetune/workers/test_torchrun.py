"""Contract under test: a rank that another one has left alone says so, in words of its own and as no bug."""

import pytest

from es_finetune.errors import RunError
from es_finetune.workers import torchrun


@pytest.mark.parametrize("call", ["stop", "evaluate", "fast_forward", "_gathered"])
def test_a_rank_that_is_left_alone_says_so(monkeypatch, call):
    def closed(*_):
        raise RuntimeError("Connection closed by peer\nof gloo")

    for name in ("broadcast_object_list", "all_gather_object"):
        monkeypatch.setattr(torchrun.dist, name, closed)
    monkeypatch.setenv("RANK", "1")
    ranks = object.__new__(torchrun.Ranks)
    ranks.count = 2
    arguments = {"stop": (), "evaluate": (0, {}, None), "fast_forward": ([],), "_gathered": (None,)}[call]
    with pytest.raises(RunError, match=r"^rank 1 .* another rank has ended, .*\(Connection closed by peer\)$"):
        getattr(ranks, call)(*arguments)
