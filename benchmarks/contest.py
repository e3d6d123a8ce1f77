"""Which toolkit makes the best samples from a few hundred photos in equal time on one machine?

python benchmarks/contest.py --data-dir photos --minutes 15 --image-size 64

Three candidates run one after the other. Run nothing else at the same time.

- This toolkit. Both models are trained within the minutes. Everything from the first import on is counted.
- denoising-diffusion-pytorch, with the training steps of its own Trainer.
- The unconditional example of diffusers, in pixel space.

The script first sets a sixth of each class aside. No candidate trains on these photos. The same `corel-diffusers
evaluate` compares the samples of all candidates with them. The toolkit also keeps its validation photos out of
training. The peers do not need validation photos, so they train on them. For the peers, the search for copies therefore
includes the validation photos, and it uses the photos as they are, not as a VAE renders them. Sampling is not part of
the minutes: the toolkit samples with 15 steps of DPM-Solver++, the peers with 50 steps of DDIM. The KID of a VAE's
reconstructions leaves out each pair of a reconstruction and its own photo. The value in brackets includes these pairs.

A second call in the same folder keeps the results that it finds there. It needs the same minutes, size, number of
samples and recipe.

Writes contest.json, contest.md, contest-kid.png (a plot) and contest.png (a row of samples per run). The samples show
your photos: do not publish contest.png.
"""

import argparse
from pathlib import Path

import common
import matplotlib.pyplot as plt
from common import ROOT, machine_name, run_command, run_script
from peers import PEERS
from PIL import Image

from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.pixels import cache_pixels
from corel_diffusers.evaluation.report import with_interval
from corel_diffusers.files import read_json, write_json, write_text
from corel_diffusers.plots import image_grid, save_image

OURS = "corel_diffusers"
RECIPE = ("vae_share", "decoder_minutes", "vae_flags", "unet_flags")
SETTINGS = ("minutes", "image_size", "num_images", "against", "reserve_minutes", *RECIPE)


def export(prepared: Path, size_px: int, folder: Path) -> Path:
    """Save the training and validation photos as PNG files of the given size and return the folder."""
    photos, pixels = cache_pixels(load_photos(prepared), (size_px, size_px))
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        for name, image in zip(photos[split]["file_name"][:], pixels[split].values, strict=True):
            Image.fromarray(image).save(folder / f"{Path(name).stem}.png")
    return folder


def train_ours(prepared: Path, args: argparse.Namespace, seed: int, run: Path) -> float:
    """Train both models and tune the decoder within the minutes. Return the seconds that all of it took.

    train_unet.py gets the minutes that remain after train_vae.py, minus those of the decoder and the reserve. The
    start-up time of train_vae.py is therefore subtracted from the time of the UNet.
    """
    shared = ["--data-dir", prepared, "--image-size", args.image_size, "--seed", seed, "--config", "tiny"]
    flags = ["--output-dir", run / "vae", "--max-train-minutes", args.vae_share * args.minutes, *args.vae_flags.split()]
    vae_seconds = run_script(ROOT / "train_vae.py", *shared, *flags)
    minutes_left = args.minutes - vae_seconds / 60 - args.decoder_minutes - args.reserve_minutes
    flags = [
        "--vae-checkpoint",
        run / "vae",
        "--output-dir",
        run / "pipeline",
        "--max-train-minutes",
        minutes_left,
        *args.unet_flags.split(),
    ]
    unet_seconds = run_script(ROOT / "train_unet.py", *shared, *flags)
    if not args.decoder_minutes:
        return vae_seconds + unet_seconds
    flags = ["--pipeline", run / "pipeline", "--data-dir", prepared, "--seed", seed, "--minutes", args.decoder_minutes]
    return vae_seconds + unet_seconds + run_command("tune-decoder", *flags)


def evaluate(prepared: Path, run: Path, args: argparse.Namespace, *flags: object) -> dict:
    """Run `corel-diffusers evaluate` and return its results without the nearest photos of each sample."""
    results = common.evaluate(prepared, run, args.num_images, args.against, *flags)
    return {name: value for name, value in results.items() if name != "nearest"}


def table(results: list[dict]) -> str:
    """Return a table with one row per run. The run with the lowest KID comes first."""
    lines = [
        "| run | seconds | KID x1000 [95 %] | FD | precision | recall | copies in pixels, in features "
        "| VAE: PSNR, KID x1000 [95 %] (with own photos) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in sorted(results, key=lambda r: r["generation"]["kid_e3"]):
        g, c, v = result["generation"], result["copies"]["pictures"], result.get("reconstruction")
        lines.append(
            f"| {result['run']} | {result['train_seconds']:.0f} | {with_interval(g)} | {g['fd']:.0f} "
            f"| {g['precision']:.2f} | {g['recall']:.2f} | {c['pixels']:.1%}, {c['features']:.1%} "
            + (f"| {v['psnr_db']:.1f} dB, {with_interval(v)} ({v['kid_e3_all_pairs']:.1f}) |" if v else "| |")
        )
    return "\n".join(lines)


def draw_plot(results: list[dict], path: Path) -> None:
    """Plot the KID of each run with its 95 % interval."""
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.4 * len(results)), layout="constrained")
    worst_first = sorted(results, key=lambda r: -r["generation"]["kid_e3"])
    for index, result in enumerate(worst_first):
        g = result["generation"]
        axes.barh(index, g["kid_e3"], color="tab:blue" if result["run"].startswith(OURS) else "tab:gray")
        axes.plot([g["kid_e3_low"], g["kid_e3_high"]], [index, index], color="black")
    axes.set_yticks(range(len(worst_first)), [result["run"] for result in worst_first])
    axes.set_xlabel("KID x1000 against photos that no run has trained on, with its 95 % interval")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, default=Path("contest"))
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--num-images", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--peer-seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", default=[OURS, *PEERS], choices=[OURS, *PEERS])
    parser.add_argument(
        "--reserve-minutes",
        type=float,
        default=0.4,
        help="part of the toolkit's minutes for imports, the last validation and the last grid",
    )
    parser.add_argument(
        "--vae-share", type=float, default=0.3, help="fraction of the toolkit's minutes in which the VAE is trained"
    )
    parser.add_argument(
        "--against",
        default="test",
        choices=["test", "validation"],
        help="held-out photos to compare with; use validation to choose a recipe",
    )
    parser.add_argument(
        "--decoder-minutes",
        type=float,
        default=0.0,
        help="part of the toolkit's minutes in which tune-decoder runs (0: it does not run)",
    )
    parser.add_argument("--vae-flags", default="", help="additional flags for train_vae.py, to try a recipe")
    parser.add_argument("--unet-flags", default="", help="additional flags for train_unet.py, to try a recipe")
    args = parser.parse_args()
    args.output_dir = args.output_dir.resolve()
    if args.against == "test" and any(getattr(args, name) != parser.get_default(name) for name in RECIPE):
        parser.error(
            "--vae-share, --vae-flags, --unet-flags: the test photos are for reported results: "
            "add --against validation to try another recipe"
        )
    if args.against == "validation" and args.only != [OURS]:
        parser.error(f"--against validation: the peers train on the validation photos: add --only {OURS}")

    prepared = args.output_dir / "data" / "corel" / "corel_all"
    flags = ["--output-dir", args.output_dir / "data", "--no-visualize", "--test-fraction", 1 / 6]
    run_command("prepare", "--data-dir", args.data_dir.resolve(), *flags)
    json_file = args.output_dir / "contest.json"
    settings = {"machine": machine_name()} | {name: getattr(args, name) for name in SETTINGS}
    title = (
        f"{args.minutes:g} minutes each, against the {args.against} photos by EfficientNet-Lite0 features, "
        f"{machine_name()}"
    )
    previous = read_json(json_file) if json_file.is_file() else settings | {"results": []}
    if not settings.items() <= previous.items():
        parser.error(
            f"{json_file}: it was measured with other settings or on another machine: use another --output-dir"
        )
    results = previous["results"]
    for name in args.only:
        for seed in args.seeds if name == OURS else args.peer_seeds:
            run = args.output_dir / f"{name}-seed{seed}"
            if any(result["run"] == f"{name}, seed {seed}" for result in results):
                continue
            if name == OURS:
                seconds = train_ours(prepared, args, seed, run)
                scores = evaluate(prepared, run, args, "--pipeline", run / "pipeline", "--seed", seed)
                grid = Image.open(run / "pipeline" / "grid.png")
            else:
                samples_dir = run / "pictures"
                photos = export(prepared, args.image_size, args.output_dir / "photos")
                flags = ["--seconds", 60 * args.minutes, "--num-images", args.num_images, "--seed", seed]
                run_script(ROOT / "benchmarks" / "peers.py", name, photos, samples_dir, *flags)
                seconds = read_json(samples_dir.with_suffix(".json"))["seconds"]
                scores = evaluate(prepared, run, args, "--pictures", samples_dir)
                grid = image_grid([Image.open(f) for f in sorted(samples_dir.glob("*.png"))[:36]], 12)
            save_image(grid, run / "samples.png")
            results.append({"run": f"{name}, seed {seed}", "train_seconds": seconds} | scores)
            write_json(json_file, settings | {"results": results})
            draw_plot(results, args.output_dir / "contest-kid.png")
            write_text(args.output_dir / "contest.md", f"{title}\n\n{table(results)}\n")
    rows = [
        Image.open(args.output_dir / result["run"].replace(", seed ", "-seed") / "samples.png") for result in results
    ]
    height = sum(row.height + 8 for row in rows)
    sheet = Image.new("RGB", (max(row.width for row in rows), height), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + 8
    save_image(sheet, args.output_dir / "contest.png")
    print((args.output_dir / "contest.md").read_text())


if __name__ == "__main__":
    main()
