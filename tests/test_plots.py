"""The plots of a run, compared with the lines that matplotlib draws."""

import gc

import pytest
from matplotlib.figure import Figure
from PIL import Image

from corel_diffusers import plots


def test_the_figures_of_earlier_plots_are_freed(tmp_path):
    gc.collect()
    gc.disable()  # it would free them too, but later
    try:
        for _ in range(5):
            record = {"epoch": 1, "loss": 1.0, "published": True}
            plots.plot_history([record], {"Losses": {"loss": "training"}}, tmp_path / "plot.png")
        assert len(plots.FIGURES) == 2, "the fourth plot has freed three"
    finally:
        gc.enable()


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures that are saved."""
    saved, save = [], Figure.savefig

    def save_and_keep(figure: Figure, *args: object, **options: object) -> None:
        saved.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", save_and_keep)
    return saved


def test_several_validations_in_an_epoch_are_plotted_over_steps(tmp_path, figures):
    history = [{"epoch": 1, "step": step, "loss": 1 / step, "published": step == 20} for step in (10, 20)]
    plots.plot_history(history, {"Losses": {"loss": "training"}}, tmp_path / "plot.png")
    (axis,) = figures[0].axes
    assert axis.get_xlabel() == "step"
    assert [list(line.get_xdata()) for line in axis.lines] == [[10, 20], [20, 20]]


def test_the_plot_shows_labelled_horizontal_lines(tmp_path, figures):
    history = [
        {"epoch": e, "step": e, "gauge": g, "loss": 1 / e, "published": e < 3}
        for e, g in ((1, 1.0), (2, 1.1), (3, 1.3))
    ]
    panels = {"Losses": {"loss": "training"}, "Gauge": {"gauge": "held-out / training"}}
    plots.plot_history(history, panels, tmp_path / "plot.png", {"Gauge": [(1.5, "copies began"), (9.0, "far above")]})
    losses, gauge = figures[0].axes
    dashed = [(line.get_ydata()[0], line.get_ydata()[1]) for line in gauge.lines if line.get_linestyle() == "--"]
    assert dashed == [(1.5, 1.5), (9.0, 9.0)]
    assert [(text.get_text(), text.xy[1]) for text in gauge.texts] == [("copies began", 1.5), ("far above", 9.0)]
    assert 1.5 < gauge.get_ylim()[1] < 9, (
        "only the first line is always in view, so that far lines do not compress the curve"
    )
    assert [line.get_xdata()[0] for line in gauge.lines if line.get_linestyle() == ":"] == [2], (
        "the epoch of the model that was saved as best"
    )
    assert not losses.texts
    assert not [line for line in losses.lines if line.get_linestyle() == "--"]
    assert Image.open(tmp_path / "plot.png").size[0] > 500
