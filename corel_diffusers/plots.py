"""Images that a run writes: plots of metrics.jsonl, and grids of photos and samples."""

import gc
import io
import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from corel_diffusers.files import atomic_file, best_record, write_bytes

if TYPE_CHECKING:
    import torch  # only for an annotation: `prepare` runs without it

# The figures that are still in memory, of 7 MB each. Only the garbage collector frees them, because they have reference
# cycles. By itself it would run after about ten plots.
FIGURES = weakref.WeakSet()
MAX_FIGURES = 3
SHEET_PX = 112  # the longer side of an image on the contact sheet


def save_image(image: Image.Image, path: Path, **options: object) -> None:
    """Save an image atomically, in the format that the suffix of the path names. options: for `Image.save`."""
    buffer = io.BytesIO()
    image.save(buffer, Image.registered_extensions()[path.suffix.lower()], **options)
    write_bytes(path, buffer.getvalue())


def to_images(images: "torch.Tensor") -> list[Image.Image]:
    """Convert images (N, 3, H, W) in [-1, 1] to PIL images."""
    values = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(value) for value in values]


def image_grid(
    images: Sequence[Image.Image], nrow: int, row_labels: Sequence[str] = (), gap_px: int = 2
) -> Image.Image:
    """Return a grid of images, `nrow` per row, on white. Each row label stands left of its row.

    Images of different sizes stand in the middle of cells of the same size.
    """
    width, height = (max(image.size[axis] for image in images) for axis in (0, 1))
    rows = math.ceil(len(images) / nrow)
    font = ImageFont.load_default(size=12)
    margin = max((int(font.getlength(label)) + 8 for label in row_labels), default=0)
    columns = min(nrow, len(images))
    canvas = Image.new(
        "RGB", (margin + columns * (width + gap_px) + gap_px, rows * (height + gap_px) + gap_px), "white"
    )
    for index, image in enumerate(images):
        row, column = divmod(index, nrow)
        left, top = margin + gap_px + column * (width + gap_px), gap_px + row * (height + gap_px)
        canvas.paste(image, (left + (width - image.width) // 2, top + (height - image.height) // 2))
    draw = ImageDraw.Draw(canvas)
    for row, label in enumerate(row_labels):
        draw.text((4, gap_px + row * (height + gap_px) + height / 2), label, fill="black", font=font, anchor="lm")
    return canvas


def contact_sheet(groups: dict[str, list[Image.Image]], columns: int = 8) -> Image.Image:
    """Return a sheet with one row of images per group, and the name of the group above its row.

    The sides of the images are at most SHEET_PX. Images after the first `columns` of a group are left out.
    """
    side_px, text_px = SHEET_PX, 20
    rows = len(groups)
    canvas = Image.new("RGB", (columns * (side_px + 4) + 4, rows * (side_px + text_px + 4) + 4), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=13)
    for row, (name, images) in enumerate(groups.items()):
        top = 4 + row * (side_px + text_px + 4)
        draw.text((6, top + text_px / 2), name, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images[:columns]):
            canvas.paste(image, (4 + column * (side_px + 4), top + text_px))
    return canvas


def plot_history(
    history: list[dict],
    panels: dict[str, dict[str, str]],
    path: Path,
    lines: dict[str, list[tuple[float, str]]] | None = None,
) -> None:
    """Plot the metrics of a run over its epochs, and save the figure at `path`. Without records, save nothing.

    If an epoch has several validations, as in a short run that was continued, the plot is over steps.

    history: the records of metrics.jsonl.
    panels: {title: {name in metrics.jsonl: label of the curve}}, one panel per title.
    lines: {title: [(height, label)]}, dashed horizontal lines in a panel. The first one is always in view.

    A dotted vertical line marks the best model, which is the one in the run folder. A panel has a
    logarithmic axis if its values are positive and span more than a factor of 50.
    """
    if not history:
        return
    from matplotlib.figure import Figure

    if len(FIGURES) >= MAX_FIGURES:
        gc.collect()
    panels = {
        title: {n: label for n, label in curves.items() if any(n in r for r in history)}
        for title, curves in panels.items()
    }
    panels = {title: curves for title, curves in panels.items() if curves}
    unit = "epoch" if len({record["epoch"] for record in history}) == len(history) else "step"
    figure = Figure(figsize=(4.2 * len(panels), 4.2), layout="constrained")
    FIGURES.add(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (title, curves) in zip(axes[0], panels.items(), strict=True):
        plotted = []
        for name, label in curves.items():
            points = [(record[unit], record[name]) for record in history if name in record]
            axis.plot(*zip(*points, strict=True), label=label, linewidth=1.3, marker="." if len(points) < 20 else None)
            plotted += [value for _, value in points]
        panel_lines = (lines or {}).get(title, [])
        axis.axvline(best_record(history)[unit], color="black", linestyle=":", linewidth=1, label="saved as best")
        if min(plotted) > 0 and np.nanmax(plotted) / min(plotted) > 50:
            axis.set_yscale("log")
        bottom, top = axis.get_ylim()
        text = {"va": "bottom", "fontsize": 7, "color": "grey", "annotation_clip": True}
        for height, label in panel_lines:
            axis.axhline(height, color="grey", linestyle="--", linewidth=1)
            axis.annotate(label, (0.01, height), xycoords=("axes fraction", "data"), **text)
        if panel_lines:
            bottom, top = min(bottom, 0.98 * panel_lines[0][0]), max(top, 1.02 * panel_lines[0][0])
        axis.set_ylim(bottom, top)
        axis.set(title=title, xlabel=unit)
        axis.grid(alpha=0.3)
        # below the panel, so that it covers no curve
        axis.legend(fontsize=8, ncols=2, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=110)
