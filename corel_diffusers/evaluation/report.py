"""The output of an evaluation: tables on the screen, rows for the model card, and one self-contained HTML page."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np
import torch
from PIL import Image

from corel_diffusers.data.pixels import evenly_spaced
from corel_diffusers.evaluation.memorization import Nearest
from corel_diffusers.files import write_text
from corel_diffusers.plots import image_grid

SHOWN_PAIRS = 8
# At 64 px, faces and small objects are lost if the PSNR of the VAE is below the first value, or if the interval of its
# KID x1000 is above the second value.
POOR_PSNR_DB, POOR_KID_E3 = 22.0, 40.0
# key in evaluation.json -> title of the row
ROWS = {
    "generation": "samples",
    "reconstruction": "VAE reconstructions (lower bound for samples)",
    "train_against_held_out": "training photos",
    "halves": "real photos against real photos (random halves, 100 splits)",
}


def with_interval(values: dict) -> str:
    """Return KID x1000 and its 95 % interval as text, "-" if there is no KID."""
    if values["kid_e3"] is None:
        return "-"
    return f"{values['kid_e3']:.1f} [{values['kid_e3_low']:.1f}, {values['kid_e3_high']:.1f}]"


def distance_rows(results: dict) -> list[tuple[str, ...]]:
    """Return the table of distances as text, one row for each pair of sets. The first row holds the column titles."""
    rows = [
        (
            f"compared with {'all' if results['held_out'] == 'all' else 'held-out'} photos",
            "n",
            "KID x1000 [95 % interval]",
            "FD (biased up at small n)",
            "precision",
            "recall",
        )
    ]
    for key, title in ROWS.items():
        if key in results:
            values = results[key]
            counts = f"{values['n'][0]:.0f} / {values['n'][1]:.0f}"
            fd = "-" if values["fd"] is None else f"{values['fd']:.1f}"
            rows.append(
                (title, counts, with_interval(values), fd, f"{values['precision']:.2f}", f"{values['recall']:.2f}")
            )
    return rows


def copy_rows(results: dict) -> list[tuple[str, ...]]:
    """Return the table of copies as text. The first row holds the column titles."""
    copies = results["copies"]
    rows = [
        (
            "copies of training photos: distance to nearest / second nearest",
            f"in pixels < {copies['pixel_ratio']:.2f}",
            f"in features ({copies['features']}) < {copies['feature_ratio']:.2f}",
        )
    ]
    titles = {
        "pictures": "samples",
        "held_out": "held-out photos (false alarms)",
        "planted": "training photos, mirrored and cropped (detection rate)",
    }
    return rows + [
        (titles[kind], *(f"{copies[kind][measure]:.1%}" for measure in ("pixels", "features")))
        for kind in titles
        if kind in copies
    ]


def copies_line(results: dict) -> str:
    """Return one line with the detection rate of the search for copies."""
    planted = results["copies"]["planted"]
    rates = f"{planted['pixels']:.0%} of them in pixels and {planted['features']:.0%} in features"
    return (
        f"if training photos are mirrored and cropped, the search for copies finds {rates}: "
        "0 % copies does not prove that there are none"
    )


def class_rows(results: dict) -> list[tuple[str, ...]]:
    """Return the table of classes as text. The first row holds the column titles."""
    rows = [
        (
            "class",
            "compared with",
            "n",
            "KID x1000 [95 % interval]",
            "class accuracy of samples",
            "class accuracy of held-out photos",
        )
    ]
    for name, v in results.get("classes", {}).items():
        photo_accuracy = "-" if v["match_photos"] is None else f"{v['match_photos']:.0%}"
        against = "held-out photos" if v["against"] == "held-out" else "all photos, also training photos"
        rows.append(
            (name, against, f"{v['n'][0]} / {v['n'][1]}", with_interval(v), f"{v['match']:.0%}", photo_accuracy)
        )
    return rows


def appearance_rows(results: dict) -> list[tuple[str, ...]]:
    """Return the table of colours and diversity as text. The first row holds the column titles."""
    colours = results["colours"]
    rows = [("colours (0 to 255) and diversity", "samples", "photos")]
    rows += [(name, f"{value:.0f}", f"{colours['photos'][name]:.0f}") for name, value in colours["pictures"].items()]
    if "diversity" in results:
        title = "mean distance within a class" if "classes" in results else "mean distance of two images"
        rows.append((title, *(f"{results['diversity'][key]:.1f}" for key in ("pictures", "photos"))))
    return rows


def tables(results: dict) -> list[list[tuple[str, ...]]]:
    """Return all tables that have rows below the column titles."""
    return [
        rows
        for rows in (distance_rows(results), copy_rows(results), class_rows(results), appearance_rows(results))
        if len(rows) > 1
    ]


def heading(results: dict) -> str:
    """Return one line: the samples, how they were made, and the photos that they are compared with."""
    line = f"{results['generation']['n'][0]} samples"
    if "sampler" in results:
        guidance = f"{'autoguidance' if results.get('guide') else 'guidance'} {results['guidance_scale']:g}"
        if tuple(results.get("guidance_interval", (0, 1))) != (0, 1):
            guidance += " at noise levels {:g} to {:g}".format(*results["guidance_interval"])
        line += f", {results['sampler']} with {results['steps']} steps, {guidance}, seed {results['seed']}"
    sizes_px = results.get("sizes_px", [results["size_px"]])  # evaluations of an earlier version had one size
    sizes = " and ".join(f"{height}x{width}" for height, width in sizes_px)
    held_out_names = {
        "test": "the test photos",
        "validation": "the validation photos (also used to choose the best model)",
        "all": "all photos",
    }
    warning = ""
    if count_trained_on := results.get("held_out_trained_on"):
        warning = f"; the model was trained on {count_trained_on} of these photos, so the numbers are too good"
    if results.get("only_classes"):
        line += f", only {', '.join(results['only_classes'])}"
    return (
        f"{line}, {sizes} px, compared with {held_out_names[results['held_out']]}; "
        f"features: {results['features']}{warning}"
    )


def reconstruction_line(results: dict) -> str:
    """Return one line with the reconstruction error of the VAE, or an empty string if there is no VAE."""
    values = results.get("reconstruction")
    if not values:
        return ""
    psnr, ssim, perceptual = (values[name] for name in ("psnr_db", "ssim", "perceptual"))
    photos = "all photos, also training photos" if results["held_out"] == "all" else "held-out photos"
    return (
        f"VAE reconstruction of {photos}: "
        f"PSNR {psnr:.2f} dB, SSIM {ssim:.3f}, perceptual distance {perceptual:.3f} (efficientnet-lite0)"
    )


def is_poor(reconstruction: dict) -> bool:
    """Return whether the VAE loses faces and small objects, by the scores of its reconstructions."""
    return reconstruction["psnr_db"] < POOR_PSNR_DB or (reconstruction["kid_e3_low"] or 0.0) > POOR_KID_E3


def scale_line(results: dict) -> str:
    """Return one line that helps to read KID, or an empty string if its values are known for another network only."""
    if results["features"] != "efficientnet-lite0":
        return ""
    return "KID x1000: noise has about 400, a good small model of 64 px about 45, real photos about 0 (lower is better)"


def on_vae(results: dict) -> list[str]:
    """Return advice if the VAE limits the samples."""
    if "reconstruction" not in results or not is_poor(results["reconstruction"]):
        return []
    return [
        "the VAE's reconstructions are poor, and samples cannot be better: train the VAE longer, and then a new UNet "
        "(with `corel-diffusers train`: give more minutes and another --output-dir)"
    ]


def table_text(results: dict) -> str:
    """Return all tables in aligned columns, and the notices, for the screen."""
    parts = [line for line in (heading(results), reconstruction_line(results)) if line]
    for rows in tables(results):
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        parts += ["", *lines]
    notices = [f"notice: {line}" for line in on_vae(results) + on_copies(results)]
    return "\n".join([*parts, "", *filter(None, [scale_line(results)]), copies_line(results), *notices])


def card_rows(results: dict) -> list[str]:
    """Return the rows for the model card's table of measured values."""
    lines = []
    for title, counts, kid, fd, _, _ in distance_rows(results)[1:]:
        lines.append(f"| {title}, n {counts}: KID x1000 [95 % interval], FD ({results['features']}) | {kid}, {fd} |")
    kinds = ("pictures", "held_out", "planted")
    rates = {key: f"{v['pixels']:.1%}, {v['features']:.1%}" for key, v in results["copies"].items() if key in kinds}
    # Earlier versions did not save the network of the search for copies.
    network = results["copies"].get("features", results["features"])
    lines.append(f"| copies of training photos, in pixels and in features ({network}) | {rates['pictures']} |")
    if "held_out" in rates:
        lines.append(f"| false alarms: held-out photos that count as copies | {rates['held_out']} |")
    if "planted" in rates:
        lines.append(f"| detection rate: mirrored and cropped training photos that are found | {rates['planted']} |")
    return lines


def sample_sheet(
    samples: Sequence[np.ndarray], labels: torch.Tensor | None, class_names: list[str], per_row: int = 12
) -> Image.Image:
    """Return a grid of the first samples, with one labelled row per class."""
    if labels is None:
        return image_grid([Image.fromarray(sample) for sample in samples[: 6 * per_row]], per_row)
    shown, names = [], []
    for label in labels.unique().tolist():
        row = [Image.fromarray(samples[i]) for i in (labels == label).nonzero().flatten().tolist()[:per_row]]
        shown += row + [Image.new("RGB", row[0].size, "white")] * (min(per_row, len(samples)) - len(row))
        names.append(class_names[label])
    return image_grid(shown, min(per_row, len(samples)), names)


def pair_sheet(samples: Sequence[np.ndarray], photos: Sequence[np.ndarray], nearest: Nearest) -> Image.Image:
    """Return a grid of the samples that are most like copies, above their two nearest training photos.

    The sample with the lowest ratio is on the left.
    """
    order = nearest.ratio.argsort()[:SHOWN_PAIRS].tolist()
    rows = [(samples, order), (photos, nearest.photo[order].tolist()), (photos, nearest.second[order].tolist())]
    return image_grid(
        [Image.fromarray(images[index]) for images, row in rows for index in row],
        len(order),
        ["sample", "nearest photo", "second nearest"],
    )


def reconstruction_sheet(
    photos: Sequence[np.ndarray], reconstructions: Sequence[np.ndarray], shown: int = 12
) -> Image.Image:
    """Return a grid of photos above their VAE reconstructions."""
    indices = evenly_spaced(len(photos), shown)
    return image_grid(
        [Image.fromarray(images[index]) for images in (photos, reconstructions) for index in indices],
        len(indices),
        ["photo", "reconstruction"],
    )


def write_html(path: Path, results: dict, sheets: dict[str, Image.Image]) -> None:
    """Write one page with the tables and the sheets. The page is self-contained: it loads no other files.

    sheets: title -> image.
    """
    images = {}
    for title, sheet in sheets.items():
        buffer = io.BytesIO()
        sheet.save(buffer, "PNG")
        images[title] = base64.b64encode(buffer.getvalue()).decode()
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = environment.get_template("report.html").render(
        title=results.get("pipeline") or results["pictures"],
        heading=heading(results),
        reconstruction=reconstruction_line(results),
        tables=tables(results),
        copies=copies_line(results),
        scale=scale_line(results),
        notices=on_vae(results) + on_copies(results),
        images=images,
    )
    write_text(path, page)


def on_copies(results: dict) -> list[str]:
    """Return advice if an evaluation found significantly more copies among the samples than among the held-out photos.

    Held-out photos cannot be copies, so their count shows the false alarms. The two counts are compared by a one-sided
    Fisher's exact test. If there are no copies, at most 5 % of evaluations give advice (both measures together).
    """
    from scipy.stats import fisher_exact  # imported here because it takes a second, and training does not need it

    copies, lines = results["copies"], []
    for measure in ("pixels", "features") if "held_out" in copies else ():
        kinds = ("pictures", "held_out")
        counts = [round(copies[kind][measure] * copies["n"][kind]) for kind in kinds]
        table = [counts, [copies["n"][kind] - count for kind, count in zip(kinds, counts, strict=True)]]
        if fisher_exact(table, alternative="greater").pvalue < 0.05 / 2:
            strongly_guided = results.get("guide") and results["guidance_scale"] > 1.5
            hint = (
                "try --guidance-scale 1.5"
                if strongly_guided
                else "train for less time, on more photos or with more --views"
            )
            fractions = (f"{copies[kind][measure]:.1%}" for kind in kinds)
            lines.append(
                f"{next(fractions)} of the samples count as copies in {measure}, "
                f"but only {next(fractions)} of the held-out photos: {hint}"
            )
    return lines
