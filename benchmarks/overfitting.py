"""Does the overfitting gauge rise before the first copy appears? Train a UNet on few photos until it copies them.

python benchmarks/overfitting.py --data-dir photos --vae-checkpoint vae_models --photos 60 --minutes 15

The script trains two UNets: one on the photos only, and one with eight augmented crops of each photo in addition. Every
hundred epochs, 48 samples are compared with the training photos. The table lists the gauge at these epochs, and its
ratio to its minimum so far.
"""

import argparse
import math
from pathlib import Path

from common import QUIET, ROOT, machine_name, run_script

from corel_diffusers.files import read_metrics, write_text
from corel_diffusers.training.gauge import lowest_gauge

COLUMNS = {
    "images_seen": "images seen",
    "seen_loss": "loss, training photos",
    "val_loss": "loss, held-out photos",
    "gauge": "gauge",
    "above_lowest": "ratio to its minimum",
    "copies_pixels": "copies in pixels",
    "copies_features": "copies in features",
    "kid_e3": "KID x1000",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--vae-checkpoint", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, default=Path("overfitting"))
    parser.add_argument("--photos", type=int, default=60)
    parser.add_argument("--minutes", type=float, default=15)
    args = parser.parse_args()
    args.output_dir = args.output_dir.resolve()
    text = f"{args.photos} photos, {args.minutes:g} minutes each, {machine_name()}\n"
    for views in (0, 8):
        run = args.output_dir / f"views-{views}"
        flags = [
            "--data-dir",
            args.data_dir.resolve(),
            "--vae-checkpoint",
            args.vae_checkpoint.resolve(),
            "--output-dir",
            run,
        ]
        flags += [
            "--max-train-samples",
            args.photos,
            "--max-train-minutes",
            args.minutes,
            "--views",
            views,
            "--config",
            "tiny",
        ]
        flags += [
            "--evaluate-every",
            100,
            "--validate-every",
            25,
            "--early-stopping-patience",
            0,
            "--oscillation-window",
            0,
        ]
        run_script(ROOT / "train_unet.py", *flags, *QUIET)
        history = read_metrics(run / "metrics.jsonl")
        rows = [
            record | {"above_lowest": record["gauge"] / lowest_gauge(history[: index + 1])}
            for index, record in enumerate(history)
            if "copies_pixels" in record
        ]
        text += (
            f"\n{views} augmented crops of each photo\n\n| {' | '.join(COLUMNS.values())} |\n{'|---' * len(COLUMNS)}|\n"
        )
        text += "".join(f"| {' | '.join(f'{row.get(name, math.nan):,.4g}' for name in COLUMNS)} |\n" for row in rows)
        write_text(args.output_dir / "overfitting.md", text)
    print(text)


if __name__ == "__main__":
    main()
