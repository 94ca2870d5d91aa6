"""Contract: a target is reached, missed or not measured by what the result files of one GPU say, and by nothing
else."""

import json

import pytest

from bench import RESULTS
from bench.common.methods import YARDSTICK
from bench.publish import tables, targets
from bench.speed import generation, kernels, tune, variants

MODELS = ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B")
GPU = {"gpu": "NVIDIA H200"}


@pytest.fixture
def folder(tmp_path):
    """Files in which every target is reached, just so; with the names that the scripts write."""

    def row(operation, variant="as shipped", backend="cuda", **figures):
        return {
            "backend": backend,
            "operation": operation,
            "variant": variant,
            "times_shipped": 1.0,
            "share_of_copy": 0.9,
            "normals_per_s": 1.3e12,
        } | figures

    labels = [operation.label for operation in tune.OPERATIONS]
    rows = [row(label) for label in labels] + [
        row(label, backend="triton", share_of_copy=0.85 * 0.9) for label in labels
    ]
    rows += [row(label, "no noise", times_shipped=0.95) for label in labels] + [
        row(label, "no keys", times_shipped=0.9) for label in labels
    ]
    rows.append({"backend": "cuda", "operation": labels[0], "variant": "128 threads", "error": "wrong bits"})
    ours = [
        ("es_kernels, master fp32", 1 / 3.8, 1 / 4.5),
        ("es_kernels, master copy", 1 / 5.5, 1),
        ("es-at-scale", 1, 1),
    ]
    of_kernels = {
        "tables": [{"model": m, "backend": "cuda", "times_flat": 1.03} for m in MODELS],
        "rivals": [
            {
                "model": m,
                "who": who,
                "what": what,
                "seconds": seconds,
                "peak_extra_bytes": 0 if who != "es-at-scale" else 1 << 30,
            }
            for m in MODELS
            for who, *both in ours
            for what, seconds in zip(("member", "update"), both, strict=True)
        ],
    }
    generations = [
        {"model": m, "workload": "countdown, 1024 tokens", "way": YARDSTICK, "answers": 99.5, "total": 100.0}
        for m in MODELS
    ]
    for name, content in (
        ("kernels", of_kernels),
        ("variants", {"rows": rows}),
        ("generation", {"generations": generations}),
    ):
        (tmp_path / f"{name}-nvidia-h200.json").write_text(json.dumps({"machine": GPU} | content))
    (tmp_path / "kernels-cpu.json").write_text(json.dumps({"machine": {}}))
    return tmp_path


def edit(folder, name, change):
    path = folder / f"{name}-nvidia-h200.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def verdicts(folder):
    (of_machine,) = targets.reports(folder).values()
    return {what: reached for what, _, _, reached in targets.rows(of_machine)}


def test_all_are_reached(folder):
    assert set(verdicts(folder).values()) == {True} and len(verdicts(folder)) == len(targets.TARGETS)


@pytest.mark.parametrize(
    "name, change, what",
    [
        (
            "variants",
            lambda c: c["rows"][0].update(share_of_copy=1.2),
            ["Triton, perturb bf16 <- f32: share of CUDA's speed"],
        ),
        (
            "kernels",
            lambda c: c["tables"].append({"model": "Qwen2.5-7B", "backend": "cuda", "times_flat": 1.04}),
            ["one launch for Qwen2.5-7B: times a flat tensor, the slowest operation"],
        ),
        (
            "kernels",
            lambda c: c["rivals"][-2].update(seconds=0.9, peak_extra_bytes=0),
            [f"es-at-scale over ours, a member of Qwen2.5-7B, master {master}" for master in ("copy", "fp32")],
        ),
        (
            "generation",
            lambda c: c["generations"][2].update(answers=98.9),
            ["outside generation, Qwen2.5-7B, 1024 tokens: share of the time"],
        ),
    ],
)
def test_what_falls_short_is_missed_and_nothing_else(folder, name, change, what):
    edit(folder, name, change)
    assert [target for target, reached in verdicts(folder).items() if reached is not True] == what
    assert not any(verdicts(folder)[target] for target in what)


def test_without_a_file_its_targets_are_not_measured(folder):
    (folder / "variants-nvidia-h200.json").unlink()
    unmeasured = [what for what, reached in verdicts(folder).items() if reached is None]
    assert len(unmeasured) == sum("es-at-scale" not in what and "Qwen" not in what for what in verdicts(folder))
    assert targets.reports(folder / "nowhere") == {}


def test_a_target_that_the_card_cannot_hold_says_so(folder):
    """Instead of "not yet"; of those that it can hold nothing changes."""
    needs = "needs 60.9 GB, 22.8 GB can be had"

    def small(content):
        content["rivals"] = [row for row in content["rivals"] if row["model"] != "Qwen2.5-7B"]
        content["left_out"] = [{"kind": "rivals", "model": "Qwen2.5-7B", "why": needs}]

    edit(folder, "kernels", small)
    edit(
        folder,
        "generation",
        lambda content: content.update(
            generations=content["generations"][:2], left_out=["Qwen2.5-7B: too little memory for weights"]
        ),
    )
    (of_machine,) = targets.reports(folder).values()
    unmeasured = {what: why for what, _, why, reached in targets.rows(of_machine) if reached is None}
    assert {what for what in unmeasured if unmeasured[what] == needs} == {
        "es-at-scale over ours, a member of Qwen2.5-7B, master copy",
        "es-at-scale over ours, a member of Qwen2.5-7B, master fp32",
        "es-at-scale over ours, the update of Qwen2.5-7B by 30 seeds",
        "temporary memory of ours with Qwen2.5-7B, bytes",
    }
    assert (
        unmeasured.pop("outside generation, Qwen2.5-7B, 1024 tokens: share of the time")
        == "too little memory for weights"
    )
    assert (
        len(unmeasured) == 4 and f"| {needs} |" in tables.aims(of_machine) and "not yet" not in tables.aims(of_machine)
    )


def test_what_another_baseline_could_not_hold_is_no_targets_reason(folder):
    def without_updates(content):
        content["rivals"] = [row for row in content["rivals"] if row["what"] != "update"]
        content["left_out"] = [
            {"kind": "rivals", "model": "Qwen2.5-7B", "who": "torch._foreach", "what": "update", "why": "needs 45.7 GB"}
        ]

    edit(folder, "kernels", without_updates)
    (of_machine,) = targets.reports(folder).values()
    assert [(what, why) for what, _, why, reached in targets.rows(of_machine) if reached is None] == [
        ("es-at-scale over ours, the update of Qwen2.5-7B by 30 seeds", None)
    ]


def test_the_names_are_those_that_the_scripts_write():
    assert targets.OURS == YARDSTICK and targets.REFERENCE == generation.REFERENCE
    assert {"no noise", "no keys"} <= set(variants.CUDA) and tune.SHIPPED == "as shipped"
    assert "countdown, 1024 tokens" in [work.name for work in generation.WORKLOADS]
    assert set(MODELS) <= set(kernels.MODELS["cuda"]) and set(MODELS) <= set(generation.MODELS["cuda"])


def test_the_tables_say_what_was_measured(folder, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", folder)
    (of_machine,) = targets.reports(folder).values()
    assert tables.aims(of_machine).count("| reached |") == len(targets.TARGETS)
    assert tables.unreached() == ""
    (folder / "variants.json").write_text((RESULTS / "variants.json").read_text())
    assert "| cuda | 128 threads | wrong bits |" in tables.variants()
