"""Pictures that a run leaves: metrics.jsonl -> curves, tensors and photos -> grids."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from corel_diffusers.files import best_record, whole_file, write_bytes

SHEET_PX = 112  # the longer side of a picture of the contact sheet


def save_picture(picture: Image.Image, path: Path, **options: object) -> None:
    """Writes a picture whole or not at all, in the format of the path's ending."""
    buffer = io.BytesIO()
    picture.save(buffer, Image.registered_extensions()[path.suffix.lower()], **options)
    write_bytes(path, buffer.getvalue())


def to_pictures(batch: torch.Tensor) -> list[Image.Image]:
    """(N, 3, H, W) in [-1, 1] -> PIL pictures."""
    values = ((batch.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(value) for value in values]


def picture_grid(pictures: Sequence[Image.Image], nrow: int, row_labels: Sequence[str] = (), gap_px: int = 2) -> Image.Image:
    """Pictures of one size in rows of `nrow` on white; `row_labels` are written left of their rows."""
    width, height = pictures[0].size
    rows = math.ceil(len(pictures) / nrow)
    font = ImageFont.load_default(size=12)
    margin = max((int(font.getlength(label)) + 8 for label in row_labels), default=0)
    columns = min(nrow, len(pictures))
    canvas = Image.new("RGB", (margin + columns * (width + gap_px) + gap_px, rows * (height + gap_px) + gap_px), "white")
    for place, picture in enumerate(pictures):
        row, column = divmod(place, nrow)
        canvas.paste(picture, (margin + gap_px + column * (width + gap_px), gap_px + row * (height + gap_px)))
    draw = ImageDraw.Draw(canvas)
    for row, label in enumerate(row_labels):
        draw.text((4, gap_px + row * (height + gap_px) + height / 2), label, fill="black", font=font, anchor="lm")
    return canvas


def contact_sheet(groups: dict[str, list[Image.Image]], columns: int = 8) -> Image.Image:
    """A row of pictures, of at most SHEET_PX, for each name, the name above its row."""
    side, line = SHEET_PX, 20
    rows = len(groups)
    canvas = Image.new("RGB", (columns * (side + 4) + 4, rows * (side + line + 4) + 4), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=13)
    for row, (name, pictures) in enumerate(groups.items()):
        top = 4 + row * (side + line + 4)
        draw.text((6, top + line / 2), name, fill="black", font=font, anchor="lm")
        for column, picture in enumerate(pictures[:columns]):
            canvas.paste(picture, (4 + column * (side + 4), top + line))
    return canvas


def plot_history(
    history: list[dict], panels: dict[str, dict[str, str]], path: Path, lines: dict[str, list[tuple[float, str]]] | None = None
) -> None:
    """Curves over epochs, a panel a title: {title: {name in metrics.jsonl: label}}; nothing is drawn before the first record. A dotted
    line stands where the model of the run's folder comes from.

    lines: {title: [(height, label)]} adds dashed horizontal lines to a panel, the first one always in view. A panel whose positive
    values span more than a factor of 50 gets a logarithmic axis.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if not history:
        return
    panels = {title: {n: label for n, label in curves.items() if any(n in r for r in history)} for title, curves in panels.items()}
    panels = {title: curves for title, curves in panels.items() if curves}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 4.2), layout="constrained", squeeze=False)
    for axis, (title, curves) in zip(axes[0], panels.items(), strict=True):
        shown = []
        for name, label in curves.items():
            points = [(record["epoch"], record[name]) for record in history if name in record]
            axis.plot(*zip(*points, strict=True), label=label, linewidth=1.3, marker="." if len(points) < 20 else None)
            shown += [value for _, value in points]
        marks = (lines or {}).get(title, [])
        axis.axvline(best_record(history)["epoch"], color="black", linestyle=":", linewidth=1, label="published")
        if min(shown) > 0 and np.nanmax(shown) / min(shown) > 50:
            axis.set_yscale("log")
        bottom, top = axis.get_ylim()
        text = {"va": "bottom", "fontsize": 7, "color": "grey", "annotation_clip": True}
        for height, label in marks:
            axis.axhline(height, color="grey", linestyle="--", linewidth=1)
            axis.annotate(label, (0.01, height), xycoords=("axes fraction", "data"), **text)
        if marks:
            bottom, top = min(bottom, 0.98 * marks[0][0]), max(top, 1.02 * marks[0][0])
        axis.set_ylim(bottom, top)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, ncols=2, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15))  # over no curve
    with whole_file(path) as beside:
        figure.savefig(beside, dpi=110)
    pyplot.close(figure)
