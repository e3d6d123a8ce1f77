"""What an evaluation shows: a table on the screen, rows for the model card, sheets of pictures, one self-contained page."""

import base64
import io
from pathlib import Path

import jinja2
import numpy as np
import torch
from PIL import Image

from corel_diffusers.advice import on_copies
from corel_diffusers.data.transforms import evenly
from corel_diffusers.evaluation.memorization import Nearest
from corel_diffusers.files import write_text
from corel_diffusers.plots import picture_grid

SHOWN_PAIRS = 8
ROWS = {
    "generation": "pictures",
    "reconstruction": "VAE reconstructions (the floor)",
    "train_against_held_out": "training photos",
    "halves": "one half of all photos against the other (of 100 splits)",
}


def with_interval(values: dict) -> str:
    """KID x1000 and its 95 % interval; "-" where it could not be told."""
    if values["kid_e3"] is None:
        return "-"
    return f"{values['kid_e3']:.1f} [{values['kid_e3_low']:.1f}, {values['kid_e3_high']:.1f}]"


def distance_rows(results: dict) -> list[tuple[str, ...]]:
    """The distances as text, a row for each pair of sets; the first row is the heading."""
    rows = [
        (
            f"against {'all' if results['held_out'] == 'all' else 'held-out'} photos",
            "n",
            "KID x1000 [95 %]",
            "FD (biased up at small n)",
            "precision",
            "recall",
        )
    ]
    for key, name in ROWS.items():
        if key in results:
            v = results[key]
            counts = f"{v['n'][0]:.0f} / {v['n'][1]:.0f}"
            fd = "-" if v["fd"] is None else f"{v['fd']:.1f}"
            rows.append((name, counts, with_interval(v), fd, f"{v['precision']:.2f}", f"{v['recall']:.2f}"))
    return rows


def copy_rows(results: dict) -> list[tuple[str, ...]]:
    """The shares of copies as text; the first row is the heading."""
    copies = results["copies"]
    rows = [
        (
            "nearest / second nearest training photo",
            f"in pixels < {copies['pixel_ratio']:.2f}",
            f"in features ({copies['features']}) < {copies['feature_ratio']:.2f}",
        )
    ]
    names = {
        "pictures": "pictures",
        "held_out": "held-out photos (false alarms)",
        "planted": "training photos, mirrored and cropped (found)",
    }
    return rows + [(names[k], *(f"{copies[k][m]:.1%}" for m in ("pixels", "features"))) for k in names if k in copies]


def copies_line(results: dict) -> str:
    """What the shares of copies can tell, in one line."""
    found = results["copies"]["planted"]
    shares = f"{found['pixels']:.0%} of them in pixels and {found['features']:.0%} in features"
    return f"of copies that are mirrored and cropped the search finds {shares}: a share of 0 % does not say that there are none"


def class_rows(results: dict) -> list[tuple[str, ...]]:
    """The classes as text; the first row is the heading."""
    rows = [("class", "photos", "n", "KID x1000 [95 %]", "looks like its class", "held-out photos do")]
    for name, v in results.get("classes", {}).items():
        photos = "-" if v["match_photos"] is None else f"{v['match_photos']:.0%}"
        against = "held-out" if v["against"] == "held-out" else "all, trained on too"
        rows.append((name, against, f"{v['n'][0]} / {v['n'][1]}", with_interval(v), f"{v['match']:.0%}", photos))
    return rows


def look_rows(results: dict) -> list[tuple[str, ...]]:
    """Colours and diversity of the pictures beside the photos' as text; the first row is the heading."""
    colours = results["colours"]
    rows = [("", "pictures", "photos")]
    rows += [(name, f"{value:.0f}", f"{colours['photos'][name]:.0f}") for name, value in colours["pictures"].items()]
    if "diversity" in results:
        name = "distance within a class" if "classes" in results else "distance of two pictures"
        rows.append((name, *(f"{results['diversity'][k]:.1f}" for k in ("pictures", "photos"))))
    return rows


def tables(results: dict) -> list[list[tuple[str, ...]]]:
    """Every table that has more than its heading."""
    return [rows for rows in (distance_rows(results), copy_rows(results), class_rows(results), look_rows(results)) if len(rows) > 1]


def heading(results: dict) -> str:
    """What was compared with what, in one line."""
    made = f"{results['generation']['n'][0]} pictures"
    if "sampler" in results:
        guidance = f"{'autoguidance' if results.get('guide') else 'guidance'} {results['guidance_scale']:g}"
        if tuple(results.get("guidance_interval", (0, 1))) != (0, 1):
            guidance += " at noise {:g} to {:g}".format(*results["guidance_interval"])
        made += f" by {results['sampler']} in {results['steps']} steps, {guidance}, seed {results['seed']}"
    height, width = results["size_px"]
    held = {"test": "the test photos", "validation": "the validation photos, which also chose the best epoch", "all": "all photos"}
    trained_on = results.get("held_out_trained_on")
    warning = f"; {trained_on} of them were not held back when the model was trained: these numbers are too good" if trained_on else ""
    made += f" of {', '.join(results['only_classes'])}" if results.get("only_classes") else ""
    return f"{made}, {height}x{width} px, against {held[results['held_out']]}; features: {results['features']}{warning}"


def reconstruction_line(results: dict) -> str:
    """The VAE's own measures in one line, empty where there is no VAE."""
    values = results.get("reconstruction")
    if not values:
        return ""
    psnr, ssim, perceptual = (values[name] for name in ("psnr_db", "ssim", "perceptual"))
    photos = "all photos, those trained on as well" if results["held_out"] == "all" else "held-out photos"
    return f"reconstruction of {photos}: PSNR {psnr:.2f} dB, SSIM {ssim:.3f}, perceptual {perceptual:.3f} (efficientnet-lite0)"


def table_text(results: dict) -> str:
    """All tables in columns, and what they say to do, for the screen."""
    parts = [line for line in (heading(results), reconstruction_line(results)) if line]
    for rows in tables(results):
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        parts += ["", *lines]
    return "\n".join([*parts, "", copies_line(results), *(f"notice: {line}" for line in on_copies(results))])


def card_rows(results: dict) -> list[str]:
    """Rows of the model card's table of measured values."""
    lines = []
    for name, counts, kid, fd, _, _ in distance_rows(results)[1:]:
        lines.append(f"| {name}, n {counts}: KID x1000 [95 %], FD ({results['features']}) | {kid}, {fd} |")
    kinds = ("pictures", "held_out", "planted")
    shares = {key: f"{v['pixels']:.1%}, {v['features']:.1%}" for key, v in results["copies"].items() if key in kinds}
    network = results["copies"].get("features", results["features"])  # an earlier version's had no name of their own
    lines.append(f"| copies of training photos, in pixels and in features ({network}) | {shares['pictures']} |")
    if "held_out" in shares:
        lines.append(f"| the same share of held-out photos (false alarms) | {shares['held_out']} |")
    if "planted" in shares:
        lines.append(f"| of training photos, mirrored and cropped (found) | {shares['planted']} |")
    return lines


def sample_sheet(pictures: np.ndarray, labels: torch.Tensor | None, class_names: list[str], per_row: int = 12) -> Image.Image:
    """The first pictures, a labelled row for each class."""
    if labels is None:
        return picture_grid([Image.fromarray(p) for p in pictures[: 6 * per_row]], per_row)
    shown, names = [], []
    for label in labels.unique().tolist():
        own = [Image.fromarray(pictures[i]) for i in (labels == label).nonzero().flatten().tolist()[:per_row]]
        shown += own + [Image.new("RGB", own[0].size, "white")] * (min(per_row, len(pictures)) - len(own))
        names.append(class_names[label])
    return picture_grid(shown, min(per_row, len(pictures)), names)


def pair_sheet(pictures: np.ndarray, photos: np.ndarray, nearest: Nearest) -> Image.Image:
    """The pictures most like a copy, their nearest and second nearest training photo below them; the ratio is falling to the left."""
    order = nearest.ratio.argsort()[:SHOWN_PAIRS].tolist()
    rows = [pictures[order], photos[nearest.photo[order].numpy()], photos[nearest.second[order].numpy()]]
    return picture_grid([Image.fromarray(p) for row in rows for p in row], len(order), ["picture", "nearest", "second"])


def reconstruction_sheet(photos: np.ndarray, made: np.ndarray, shown: int = 12) -> Image.Image:
    """Photos over what the VAE makes of them."""
    places = evenly(len(photos), shown)
    return picture_grid(
        [Image.fromarray(p) for row in (photos[places], made[places]) for p in row], len(places), ["photo", "reconstruction"]
    )


def write_html(path: Path, results: dict, sheets: dict[str, Image.Image]) -> None:
    """One page with the tables and the sheets in it: nothing is loaded from elsewhere."""
    images = {}
    for name, sheet in sheets.items():
        buffer = io.BytesIO()
        sheet.save(buffer, "PNG")
        images[name] = base64.b64encode(buffer.getvalue()).decode()
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = environment.get_template("report.html").render(
        title=results.get("pipeline") or results["pictures"],
        heading=heading(results),
        reconstruction=reconstruction_line(results),
        tables=tables(results),
        copies=copies_line(results),
        notices=on_copies(results),
        images=images,
    )
    write_text(path, page)
