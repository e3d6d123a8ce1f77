"""Who makes the best pictures of a few hundred photos in equal time on one machine?

python benchmarks/contest.py --data-dir photos --minutes 15 --image-size 64

One after the other, nothing else running: this toolkit (both models in the minutes, everything counted from the first import on),
denoising-diffusion-pytorch with the steps of its own Trainer, and diffusers' pixel-space example. A sixth of each class is set aside
first; nobody trains on it, and the same `corel-diffusers evaluate` compares everybody's pictures with it. The toolkit also
keeps its validation photos from training; the peers, which have no use for them, train on those too, and their pictures are searched
for copies of those too, and of photos as no VAE has rendered them. Drawing the pictures is outside the minutes: the toolkit takes 15
steps of DPM-Solver++, the peers 50 of DDIM. A VAE's reconstruction is not counted with its own photo, in brackets with it.

What an earlier call has measured in the folder, with the same minutes, size, number of pictures and recipe, stands.

Leaves contest.json, contest.md, contest-kid.png (a plot), and contest.png (a row of samples each: of your photos, so not for publication).
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
from common import ROOT, launch, machine, tool
from peers import PEERS
from PIL import Image

from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.transforms import cache_pixels
from corel_diffusers.evaluation.report import with_interval
from corel_diffusers.files import read_json, write_json, write_text
from corel_diffusers.plots import picture_grid, save_picture

OURS = "corel_diffusers"
RECIPE = ("vae_share", "vae_flags", "unet_flags")
SETTING = ("minutes", "image_size", "num_images", "against", "reserve_minutes", *RECIPE)


def export(prepared: Path, size_px: int, folder: Path) -> Path:
    """The photos that may be trained on, as PNG files of the size."""
    photos, pixels = cache_pixels(load_photos(prepared), (size_px, size_px))
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        for name, values in zip(photos[split]["file_name"][:], pixels[split].values, strict=True):
            Image.fromarray(values).save(folder / f"{Path(name).stem}.png")
    return folder


def train_ours(prepared: Path, args: argparse.Namespace, seed: int, run: Path) -> float:
    """Both models in the minutes; what starting the first script takes is taken from the second's time. Seconds in all."""
    shared = ["--data-dir", prepared, "--image-size", args.image_size, "--seed", seed, "--config", "tiny"]
    flags = ["--output-dir", run / "vae", "--max-train-minutes", args.vae_share * args.minutes, *args.vae_flags.split()]
    spent = launch(ROOT / "train_vae.py", *shared, *flags)
    left = args.minutes - spent / 60 - args.reserve_minutes
    flags = ["--vae-checkpoint", run / "vae", "--output-dir", run / "pipeline", "--max-train-minutes", left, *args.unet_flags.split()]
    return spent + launch(ROOT / "train_unet.py", *shared, *flags)


def evaluate(prepared: Path, run: Path, args: argparse.Namespace, *what: object) -> dict:
    """What `corel-diffusers evaluate` says, but for each picture's nearest photos."""
    tool("evaluate", "--data-dir", prepared, "--output-dir", run, "--num-images", args.num_images, "--against", args.against, *what)
    return {name: value for name, value in read_json(run / "evaluation.json").items() if name != "nearest"}


def table(results: list[dict]) -> str:
    """A row for each run, the best first."""
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
    """KID of each run with its interval."""
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.4 * len(results)), layout="constrained")
    worst_first = sorted(results, key=lambda r: -r["generation"]["kid_e3"])
    for place, result in enumerate(worst_first):
        g = result["generation"]
        axes.barh(place, g["kid_e3"], color="tab:blue" if result["run"].startswith(OURS) else "tab:gray")
        axes.plot([g["kid_e3_low"], g["kid_e3_high"]], [place, place], color="black")
    axes.set_yticks(range(len(worst_first)), [result["run"] for result in worst_first])
    axes.set_xlabel("KID x1000 against photos that nobody trained on, with its 95 % interval")
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
    parser.add_argument("--reserve-minutes", type=float, default=0.4, help="of the toolkit's time: imports, last validation, last grid")
    parser.add_argument("--vae-share", type=float, default=0.3, help="of the toolkit's minutes")
    parser.add_argument("--against", default="test", choices=["test", "validation"], help="validation, to choose a recipe by")
    parser.add_argument("--vae-flags", default="", help="more flags for train_vae.py, to try a recipe")
    parser.add_argument("--unet-flags", default="", help="more flags for train_unet.py")
    args = parser.parse_args()
    args.output_dir = args.output_dir.resolve()
    if args.against == "test" and any(getattr(args, name) != parser.get_default(name) for name in RECIPE):
        parser.error("another recipe is chosen with --against validation: the test photos are for what is reported")
    if args.against == "validation" and args.only != [OURS]:
        parser.error(f"the peers train on the validation photos: give --only {OURS} beside --against validation")

    prepared = args.output_dir / "data" / "corel" / "corel_all"
    flags = ["--output-dir", args.output_dir / "data", "--no-visualize", "--test-fraction", 1 / 6]
    tool("prepare", "--data-dir", args.data_dir.resolve(), *flags)
    numbers = args.output_dir / "contest.json"
    setting = {"machine": machine()} | {name: getattr(args, name) for name in SETTING}
    title = f"{args.minutes:g} minutes each, against the {args.against} photos by EfficientNet-Lite0 features, {machine()}"
    before = read_json(numbers) if numbers.is_file() else setting | {"results": []}
    if not setting.items() <= before.items():
        parser.error(f"{numbers} is of other settings or of another machine: give another --output-dir")
    results = before["results"]
    for name in args.only:
        for seed in args.seeds if name == OURS else args.peer_seeds:
            run = args.output_dir / f"{name}-seed{seed}"
            if any(result["run"] == f"{name}, seed {seed}" for result in results):
                continue
            if name == OURS:
                seconds = train_ours(prepared, args, seed, run)
                found = evaluate(prepared, run, args, "--pipeline", run / "pipeline", "--seed", seed)
                pictures = Image.open(run / "pipeline" / "grid.png")
            else:
                made = run / "pictures"
                photos = export(prepared, args.image_size, args.output_dir / "photos")
                flags = ["--seconds", 60 * args.minutes, "--num-images", args.num_images, "--seed", seed]
                launch(ROOT / "benchmarks" / "peers.py", name, photos, made, *flags)
                seconds = read_json(made.with_suffix(".json"))["seconds"]
                found = evaluate(prepared, run, args, "--pictures", made)
                pictures = picture_grid([Image.open(f) for f in sorted(made.glob("*.png"))[:36]], 12)
            save_picture(pictures, run / "samples.png")
            results.append({"run": f"{name}, seed {seed}", "train_seconds": seconds} | found)
            write_json(numbers, setting | {"results": results})
            draw_plot(results, args.output_dir / "contest-kid.png")
            write_text(args.output_dir / "contest.md", f"{title}\n\n{table(results)}\n")
    rows = [Image.open(args.output_dir / result["run"].replace(", seed ", "-seed") / "samples.png") for result in results]
    height = sum(row.height + 8 for row in rows)
    sheet = Image.new("RGB", (max(row.width for row in rows), height), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + 8
    save_picture(sheet, args.output_dir / "contest.png")
    print((args.output_dir / "contest.md").read_text())


if __name__ == "__main__":
    main()
