"""How much faster is a batch of photos read from the cache than decoded in a data loader?

python benchmarks/data.py --image-size 64
"""

import argparse
import os
import tempfile
import time
from functools import partial
from pathlib import Path

from common import compare, machine_name, make_photos


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = folder  # a temporary cache
        from plain import Photos, endless
        from torch.utils.data import DataLoader

        from corel_diffusers.data.batches import BatchPlan, training_batches
        from corel_diffusers.data.photos import load_photos
        from corel_diffusers.data.pixels import cache_pixels, to_float

        photos = make_photos(Path(folder) / "photos")
        decoded = endless(DataLoader(Photos(photos, args.image_size), args.batch_size, shuffle=True, drop_last=True))
        pixels = cache_pixels(load_photos(photos), (args.image_size, args.image_size))[1]["train"]
        plan = BatchPlan(len(pixels), args.batch_size, 1, 1, 0, seed=0)
        cached = (to_float(values) for (values,) in training_batches(plan, 0, None, 0, pixels.values))

        def seconds(batches: object) -> list[float]:
            batch_seconds = []
            for _ in range(args.batches):
                start = time.monotonic()
                next(batches)
                batch_seconds.append(time.monotonic() - start)
            return batch_seconds

        sides = {"decoded in the loader": partial(seconds, decoded), "from the cache": partial(seconds, cached)}
        print(
            machine_name("cpu"),
            compare(f"{args.batch_size} photos at {args.image_size} px", sides, args.repeats, "ms per batch"),
            sep="\n",
        )


if __name__ == "__main__":
    main()
