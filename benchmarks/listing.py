"""How long does it take to find and list the photos of a folder, in each layout, and how much memory does it need?

python benchmarks/listing.py --photos 10000

Makes small photos and arranges them as links in one folder per layout. A new process loads each folder: its time counts
from the call of `load_photos`, without the imports. Its memory is the growth of the resident memory during the call.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from common import ROOT, machine_name
from PIL import Image

CLASSES = 100
LOAD = """
import json, sys, time
import psutil
from corel_diffusers.data.photos import load_photos
memory = psutil.Process().memory_info
before, start = memory().rss, time.monotonic()
photos = load_photos(sys.argv[1])
seconds = time.monotonic() - start
names = photos["train"].features["label"].names
print(json.dumps({"seconds": seconds, "mib": (memory().rss - before) / 2**20, "classes": len(names),
                  "photos": sum(map(len, photos.values()))}))
"""


def link(photos: list[Path], folder: Path, names: list[str]) -> Path:
    """Make one hard link per photo: the names are paths in the folder."""
    for photo, name in zip(photos, names, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).hardlink_to(photo)
    return folder


def layouts(photos: list[Path], root: Path) -> Iterator[tuple[str, Path]]:
    """Yield the name and the folder of each layout."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    numbers = range(len(photos))
    classes = [number % CLASSES for number in numbers]
    splits = ["train" if number % 10 else "val" for number in numbers]
    rows = [{"file_name": f"{n}.jpg", "label": f"class {c}", "text": f"a photo of class {c}"}
            for n, c in zip(numbers, classes, strict=True)]  # fmt: skip
    names = {
        "flat": [f"{n}.jpg" for n in numbers],
        "raw Corel": [f"{c + 1:04d}_{n:04d}.jpg" for n, c in zip(numbers, classes, strict=True)],
        "Corel-5K": [f"{(c + 1) * 1000 + n // CLASSES}.jpeg" for n, c in zip(numbers, classes, strict=True)],
        "class folders": [f"class {c}/{n}.jpg" for n, c in zip(numbers, classes, strict=True)],
        "splits": [f"{s}/{n}.jpg" for n, s in zip(numbers, splits, strict=True)],
        "splits of class folders": [f"{s}/class {c}/{n}.jpg" for n, s, c in zip(numbers, splits, classes, strict=True)],
        "folders of a camera": [f"DCIM/{100 + n // 1000}CANON/IMG_{n}.jpg" for n in numbers],
    }
    for name, files in names.items():
        yield name, link(photos, root / name, files)
    table = link(photos, root / "metadata.jsonl", names["flat"])
    (table / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield "metadata.jsonl", table
    table = link(photos, root / "metadata.csv", names["flat"])
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    (table / "metadata.csv").write_text("\n".join(lines) + "\n")
    yield "metadata.csv", table
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=[f"class {c}" for c in range(CLASSES)])})
    files = [{"bytes": photo.read_bytes(), "path": None} for photo in photos]
    dataset = Dataset.from_dict({"image": files, "label": classes}, features)
    dataset.save_to_disk(root / "save_to_disk")
    yield "save_to_disk", root / "save_to_disk"
    (root / "parquet").mkdir()
    dataset.to_parquet(root / "parquet" / "train-00000-of-00001.parquet")
    yield "parquet", root / "parquet"


def make_jpegs(folder: Path, count: int) -> list[Path]:
    """Save `count` different photos of noise, of 48 x 32 pixels."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    files = [folder / f"{number}.jpg" for number in range(count)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (32, 48, 3), np.uint8)).save(file)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=10_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        print(f"{args.photos:,} photos, {machine_name('cpu')}\n\n| layout | seconds | MiB | photos | classes |")
        print("|---|---|---|---|---|")
        for name, folder in layouts(make_jpegs(root / "photos", args.photos), root):
            done = subprocess.run(
                [sys.executable, "-c", LOAD, folder], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
            )
            found = json.loads(done.stdout.splitlines()[-1])
            print(f"| {name} | {found['seconds']:.2f} | {found['mib']:.0f} | {found['photos']} | {found['classes']} |")


if __name__ == "__main__":
    main()
