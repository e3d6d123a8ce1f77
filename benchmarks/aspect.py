"""Do full frames cost quality or time? Wide and tall photos with --aspect-buckets, and their centre squares.

python benchmarks/aspect.py --data-dir training_data/corel/corel_all --minutes 15

Trains a VAE and a UNet twice, for the same minutes and in the same precision: on the centre square of each photo, and
on the full photos in several sizes of about the same area. Each pipeline is evaluated in its own frame. Then the centre
squares of the samples of both are compared with the centre squares of the held-out photos, in the same size.
"""

import argparse
from pathlib import Path

from common import ROOT, evaluate, machine_name, run_command, run_script
from PIL import Image, ImageOps

from corel_diffusers.evaluation.report import with_interval
from corel_diffusers.files import best_record, read_json, read_metrics, write_text

SETTINGS = {"centre square": ["--image-size", "80"], "full frame": ["--image-size", "64x96", "--aspect-buckets"]}
SQUARE_PX = 64  # the shorter side of the samples of the full frame
COLUMNS = (
    "| setting | sizes | ms per step, VAE | ms per step, UNet | PSNR of the VAE | held-out loss of the UNet "
    "| KID x1000 of the VAE | KID x1000 of samples | KID x1000 of samples, both as squares of 64 px |"
)


def train(args: argparse.Namespace, folder: Path, flags: list[str], precision: list[str]) -> list[str]:
    """Train both models in the folder, and return the flags of the precision that they were trained in."""
    shared = ["--data-dir", args.data_dir, "--config", "tiny", *precision]
    aspect = [flag for flag in flags if flag == "--aspect-buckets"]
    run_script(ROOT / "train_vae.py", *shared, *flags, "--output-dir", folder / "vae",
               "--max-train-minutes", args.minutes / 3)  # fmt: skip
    plan = read_json(folder / "vae" / "run.json")["plan"]
    precision = ["--mixed-precision", plan["mixed_precision"], "--attention", plan["attention"]]
    run_script(ROOT / "train_unet.py", *shared[:4], *precision, *aspect, "--vae-checkpoint", folder / "vae",
               "--output-dir", folder / "unet", "--max-train-minutes", 2 * args.minutes / 3)  # fmt: skip
    return precision


def milliseconds_per_step(run: Path) -> float:
    """Return the mean time of a step in the second half of a run, validations and samples included."""
    records = read_metrics(run / "metrics.jsonl")
    middle, last = records[len(records) // 2 - 1], records[-1]
    return 1e3 * (last["seconds"] - middle["seconds"]) / (last["step"] - middle["step"])


def square_samples(pipeline: Path, folder: Path, num_images: int) -> Path:
    """Write the centre squares of samples, in all sizes of the pipeline, as images of SQUARE_PX."""
    sizes = read_json(pipeline / "model_index.json")["image_sizes"] or {None: 1}
    folder.mkdir(parents=True)
    for size, count in sizes.items():
        images = round(num_images * count / sum(sizes.values()))
        output = folder.with_name(f"{folder.name}_{size}.png")
        run_command("generate", "--pipeline", pipeline, "--num-images", images, "--individual", "--seed", 0,
                    "--nrow", 25, "--output", output, *(["--size", size] if size else []))  # fmt: skip
        for file in output.with_name(f"{output.stem}_individual").glob("*.png"):
            square = ImageOps.fit(Image.open(file), (SQUARE_PX, SQUARE_PX), Image.Resampling.LANCZOS)
            square.save(folder / f"{size}_{file.name}")
    return folder


def row(args: argparse.Namespace, name: str, folder: Path) -> str:
    """Evaluate the pipeline in the folder and return its row of the table."""
    own = evaluate(args.data_dir, folder, args.num_images, args.against, "--pipeline", folder / "unet")
    squares = square_samples(folder / "unet", folder / "squares", args.num_images)
    as_squares = evaluate(args.data_dir, folder / "squares_evaluation", args.num_images, args.against,
                          "--pictures", squares)  # fmt: skip
    sizes = ", ".join(f"{height}x{width}" for height, width in own["sizes_px"])
    vae, unet = (best_record(read_metrics(folder / run / "metrics.jsonl")) for run in ("vae", "unet"))
    times = [milliseconds_per_step(folder / run) for run in ("vae", "unet")]
    cells = [name, sizes, *(f"{time:.1f}" for time in times), f"{vae['val_psnr']:.2f} dB", f"{unet['val_loss']:.4f}"]
    cells += [with_interval(own["reconstruction"]), with_interval(own["generation"])]
    return f"| {' | '.join([*cells, with_interval(as_squares['generation'])])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, default=Path("aspect"))
    parser.add_argument("--minutes", type=float, default=15, help="for both models of a setting")
    parser.add_argument("--num-images", type=int, default=300)
    parser.add_argument("--against", default="auto")
    args = parser.parse_args()
    args.data_dir, args.output_dir = args.data_dir.resolve(), args.output_dir.resolve()
    precision: list[str] = []
    for name, flags in SETTINGS.items():
        precision = train(args, args.output_dir / name, flags, precision)
    rows = [COLUMNS, "|" + "---|" * (COLUMNS.count("|") - 1)]
    rows += [row(args, name, args.output_dir / name) for name in SETTINGS]
    text = f"{args.minutes:g} minutes each, {' '.join(precision)}, {machine_name()}\n\n" + "\n".join(rows) + "\n"
    write_text(args.output_dir / "aspect.md", text)
    print(text)


if __name__ == "__main__":
    main()
