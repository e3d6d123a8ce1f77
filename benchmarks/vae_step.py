"""How much faster is the toolkit's VAE training step than that of a plain loop with the same model and loss?

python benchmarks/vae_step.py --sizes 64 128 --repeats 5

The plain loop is in plain.py. The toolkit's side is train_vae.py itself, with AdamW. The full training loop is timed,
with reading, averaging and logging. Both sides compute the perceptual loss. Run nothing else at the same time.
"""

import os
import tempfile
from functools import partial
from pathlib import Path

from common import QUIET, ROOT, compare, machine_name, make_photos, step_arguments, step_seconds


def main() -> None:
    args = step_arguments(__doc__, batch_size=8, steps=15)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = folder  # a temporary cache
        photos = make_photos(Path(folder) / "photos")
        for size_px in args.sizes:
            shared = ["--config", args.config, "--image-size", size_px, "--batch-size", args.batch_size]
            plain = [ROOT / "benchmarks" / "plain.py", "vae", photos, *shared, "--steps", args.warmup + args.steps]
            flags = [
                "--crop-chance",
                0,
                "--optimizer",
                "adamw",
                "--max-train-steps",
                args.warmup + args.steps,
                "--validate-every",
                10**6,
            ]
            toolkit = [ROOT / "train_vae.py", "--data-dir", photos, *shared, *flags, *args.compiled, *QUIET]
            sides = {
                "plain loop": partial(step_seconds, *plain, warmup=args.warmup),
                " ".join(["train_vae.py", *args.compiled]): partial(step_seconds, *toolkit, warmup=args.warmup),
            }
            lines.append(
                compare(f"VAE step, {args.config}, {size_px} px, batch {args.batch_size}", sides, args.repeats)
            )
    print(machine_name(), *lines, sep="\n")


if __name__ == "__main__":
    main()
