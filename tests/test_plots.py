"""The plots of a run, compared with the lines that matplotlib draws."""

import gc

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


def test_the_plot_shows_labelled_horizontal_lines(tmp_path, monkeypatch):
    history = [
        {"epoch": e, "step": e, "gauge": g, "loss": 1 / e, "published": e < 3}
        for e, g in ((1, 1.0), (2, 1.1), (3, 1.3))
    ]
    figures, save = [], Figure.savefig

    def save_and_keep(figure: Figure, *args: object, **options: object) -> None:
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", save_and_keep)
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
