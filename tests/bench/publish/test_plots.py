"""Contract: a reader understands a plot by itself. Each panel's title says which end is better, numbers on the axes are
plain, a point that was not measured is hollow and its legend says why, and no text lies on another or on a point."""

import itertools
import json

import pytest

from bench.publish import plots


@pytest.fixture(params=[*sorted(plots.PLOTS), "sizes of a GPU"])
def figure(request):
    from matplotlib import pyplot

    if request.param in plots.PLOTS:
        figure = plots.drawn(request.param)
    else:
        report = json.loads((plots.RESULTS / "kernels-cpu.json").read_text())
        report["calls"] = [row | {"backend": name} for row in report["calls"] for name in ("cuda", "triton")]
        figure, (ax,) = plots._figure()
        plots.sizes(ax, report)
    figure.draw_without_rendering()
    figure.draw_without_rendering()  # a layout changes which ticks there are, so it takes two
    yield figure
    pyplot.close(figure)


def texts_of(ax):
    """All that is written, without the ticks beyond the ends of an axis, which are not drawn."""
    ticks = [
        tick.label1
        for axis in (ax.xaxis, ax.yaxis)
        for tick in axis.get_major_ticks()
        if min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    ]
    legend = ax.get_legend()
    written = [*ticks, ax.xaxis.label, ax.yaxis.label, ax._left_title, *ax.texts]
    return [text for text in (*written, *legend.get_texts(), legend.get_title()) if text.get_text()]


def test_every_title_says_which_end_is_better(figure):
    assert all(
        "higher is better" in ax.get_title("left") or "lower is better" in ax.get_title("left") for ax in figure.axes
    )


def test_no_power_of_two_and_no_ulp(figure):
    words = [text.get_text() for ax in figure.axes for text in texts_of(ax)]
    assert words and not [word for word in words if "^" in word or "$" in word or "ulp" in word]


def test_no_text_lies_on_another(figure):
    texts = [text for ax in figure.axes for text in texts_of(ax)]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    assert [(a, b) for (a, first), (b, second) in itertools.combinations(boxes, 2) if first.overlaps(second)] == []
    page = figure.bbox
    assert [a for a, box in boxes if box.x0 < page.x0 or box.x1 > page.x1 or box.y1 > page.y1] == []


def test_no_point_lies_under_a_legend(figure):
    for ax in figure.axes:
        box = ax.get_legend().get_window_extent()
        for line in ax.lines:
            if line.get_transform() == ax.transData and len(line.get_xdata()):
                assert not box.count_contains(ax.transData.transform(line.get_xydata())), line.get_label()


def hollow(ax):
    return [line for line in ax.lines if line.get_markerfacecolor() == "white" and len(line.get_xdata())]


def test_an_extrapolated_point_is_hollow_and_named():
    report = json.loads((plots.RESULTS / "generation-cpu.json").read_text())
    (ax,) = plots.drawn("generation").axes
    limits = {row["longest_measured"] for row in report["break_even"]}
    assert sum(len(line.get_xdata()) for line in hollow(ax)) == sum(
        int(n) > row["longest_measured"]
        for row in report["break_even"]
        if row["way"] in (plots.REFERENCE, plots.OURS)
        for n in row["seconds_answers"]
    )
    assert min(min(line.get_xdata()) for line in hollow(ax)) > min(limits)
    assert "extrapolated from shorter answers" in [text.get_text() for text in ax.get_legend().get_texts()]


def test_a_simulated_point_is_hollow_and_named():
    (ax,) = plots.drawn("scale").axes
    assert len(hollow(ax)) == len(ax.lines) == 4 and ax.get_legend().get_title().get_text() == "simulated"
