"""Convert raw Corel photos to imagefolders: `corel-diffusers prepare`.

This writes `<output>/corel/corel_all/`, `<output>/corel/class_0001/` and so on, and a contact sheet. Each folder has
its photos, metadata.jsonl, captions.json, split.json and classes.txt. The original photos are only read. Each photo
that is done has one line in `prepared.jsonl`, and later runs skip it. So an interrupted run continues, and a run after
a finished run changes nothing.
"""

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from corel_diffusers.data.borders import black_borders
from corel_diffusers.data.decoding import MIN_SIDE_PX, PhotoError, open_photo, orientation
from corel_diffusers.data.duplicates import duplicate_groups, photo_hashes
from corel_diffusers.data.folder_contents import FolderContents, Photo
from corel_diffusers.data.folders import find_photos
from corel_diffusers.data.prepared_folders import (
    Prepared,
    draw_sheet,
    read_prepared,
    remove_old,
    write_duplicates,
    write_folders,
)
from corel_diffusers.data.splits import complete_split
from corel_diffusers.data.tree import SHEET, most_common_reasons
from corel_diffusers.files import UserError, atomic_file, read_json, write_json, write_text

MAX_NAME_BYTES = 240  # file systems allow 255, and endings are added to names
BATCH_PHOTOS = 64  # photos given to the threads at a time: an interruption loses the work on at most this many


def prepare(
    data_dir: Path,
    output_dir: Path,
    figs_dir: Path | None,
    layout: str,
    trim_borders: bool,
    strict: bool,
    test_fraction: float = 0.0,
) -> None:
    """Prepare the photos of `data_dir` and print a summary.

    Raises:
        UserError: the photos cannot be prepared, or a file cannot be used and `strict` is set.
    """
    if (data_dir / "split.json").is_file() and (data_dir / "metadata.jsonl").is_file():
        raise UserError(f"--data-dir {data_dir} is already prepared (it has split.json): train on it directly")
    found = find_photos(data_dir, layout)
    if len(found.photos) < 2:
        raise UserError(
            f"{data_dir} holds {len(found.photos)} photos in the layout {found.layout}: at least two are needed, "
            "one of them for validation"
        )
    if strict:
        refuse_bad_photos(found)
    corel = output_dir / "corel"
    check_same_source(corel, data_dir)
    (corel / "corel_all").mkdir(parents=True, exist_ok=True)
    done = prepare_photos(found, corel, trim_borders)

    skipped = found.left_out | {
        photo.file_name: done[photo.file_name].reason for photo in found.photos if done[photo.file_name].reason
    }
    write_json(corel / "skipped.json", skipped)
    photos = [photo for photo in found.photos if not done[photo.file_name].reason]
    if len(photos) < 2:
        raise UserError(
            f"No images found in {data_dir} that can be used: "
            f"{'; '.join(f'{n}: {r}' for n, r in list(skipped.items())[:3])}"
        )
    refuse_lost_classes(found, done, photos)
    groups = duplicate_groups([done[photo.file_name].phashes for photo in photos])
    num_duplicates = write_duplicates(corel, photos, groups)
    split_names = complete_split(
        [photo.class_number for photo in photos],
        [photo.file_name for photo in photos],
        [photo.split for photo in photos],
        groups,
        test_fraction,
    )
    tell_about_shared_photos(found, split_names, groups)
    write_folders(corel, found, photos, [done[photo.file_name].file_name for photo in photos], split_names)
    remove_old(corel, data_dir, found, done)
    if figs_dir:
        draw_sheet(figs_dir / SHEET, corel / "corel_all", found, photos, done)

    print_summary(found, photos, split_names, done, num_duplicates, skipped, corel)


def tell_about_shared_photos(found: FolderContents, split_names: list[str], groups: list[int]) -> None:
    """Add a notice if held-out photos are duplicates of training photos: the photos came with their own splits."""
    trained = {group for group, split in zip(groups, split_names, strict=True) if split == "train"}
    shared = sum(split != "train" and group in trained for group, split in zip(groups, split_names, strict=True))
    if shared:
        found.notices.append(
            f"{shared} held-out photos are duplicates of training photos, because the photos came with their own "
            "splits: measured on them, a model looks too good (see duplicates.json)"
        )


def print_summary(
    found: FolderContents,
    photos: list[Photo],
    split_names: list[str],
    done: dict[str, Prepared],
    num_duplicates: int,
    skipped: dict[str, str],
    corel: Path,
) -> None:
    """Print what was prepared. skipped: file name -> why it was left out."""
    for notice in found.notices:
        print(f"notice: {notice}")
    trimmed = sum(any(done[photo.file_name].borders) for photo in photos)
    counts = f"{split_names.count('train')} for training, {split_names.count('validation')} for validation" + (
        f", {split_names.count('test')} for testing" if "test" in split_names else ""
    )
    print(f"{len(photos)} photos in {max(1, len(found.classes))} classes ({found.layout}): {counts}")
    print(f"black borders trimmed: {trimmed}; duplicates: {num_duplicates}")
    if skipped:
        print(f"left out: {len(skipped)} ({most_common_reasons(skipped, 5)}), see {corel / 'skipped.json'}")
    print(f"prepared: {corel / 'corel_all'}")


def refuse_lost_classes(found: FolderContents, done: dict[str, Prepared], photos: list[Photo]) -> None:
    """Raise UserError if no photo of a class can be used. photos: those that can be used."""
    lost = found.classes.keys() - {photo.class_number for photo in photos}
    for number in sorted(lost):
        reasons = {p.file_name: done[p.file_name].reason for p in found.photos if p.class_number == number}
        raise UserError(
            f"--data-dir: no photo of the class {found.classes[number]} can be used ({most_common_reasons(reasons)}): "
            "repair its photos, or remove them to train without this class"
        )


def refuse_bad_photos(found: FolderContents) -> None:
    """Open every photo before anything is written. Raise UserError at the first file that cannot be used."""
    for name, reason in found.left_out.items():
        raise UserError(f"--strict: {name} cannot be used ({reason}): remove the file, or omit --strict")
    for photo in tqdm(found.photos, "checking", leave=False, disable=None):
        try:
            open_photo(photo.path)
        except PhotoError as error:
            raise UserError(
                f"--strict: {photo.file_name} cannot be used ({error}): remove the file, or omit --strict"
            ) from None


def check_same_source(corel: Path, data_dir: Path) -> None:
    """Raise UserError if the output folder has the photos of another source. Otherwise write down the source."""
    record = corel / "source.json"
    try:
        source = {"data_dir": os.path.relpath(data_dir.resolve(), corel.resolve())}
    except ValueError:  # Windows has no relative path between two drives
        source = {"data_dir": str(data_dir.resolve())}
    if record.is_file() and read_json(record) != source:
        raise UserError(
            f"--output-dir {corel.parent} holds photos prepared from another folder (see {record}): give another folder"
        )
    write_json(record, source)


def prepare_photos(found: FolderContents, corel: Path, trim_borders: bool) -> dict[str, Prepared]:
    """Convert and trim each photo that is not done yet into corel_all/. Return file name -> Prepared."""
    record = corel / "prepared.jsonl"
    done = {line.source: line for line in read_prepared(record)}
    # remove an incomplete line: a killed run can leave one
    write_text(record, "".join(json.dumps(asdict(line)) + "\n" for line in done.values()))
    names, to_do = output_names(found.photos, {line.source: line.file_name for line in done.values()}), []
    for photo in found.photos:
        stat = photo.path.stat()
        line = done.get(photo.file_name)
        stamp = (stat.st_size, stat.st_mtime_ns, trim_borders)
        if (
            line
            and (line.size, line.changed, line.trim) == stamp
            and (line.reason or (corel / "corel_all" / line.file_name).is_file())
        ):
            continue
        to_do.append((photo, Prepared(photo.file_name, *stamp, names[photo.file_name])))
    with (
        record.open("a", encoding="utf-8") as log,
        ThreadPoolExecutor() as pool,  # threads run in parallel: Pillow releases the GIL
        tqdm(desc="preparing", total=len(to_do), unit=" photos", leave=False, disable=None) as bar,
    ):
        for start in range(0, len(to_do), BATCH_PHOTOS):
            for line in pool.map(
                lambda item: prepare_photo(*item, corel / "corel_all"), to_do[start : start + BATCH_PHOTOS]
            ):
                done[line.source] = line
                log.write(json.dumps(asdict(line)) + "\n")
                log.flush()
                bar.update()
    return done


def prepare_photo(photo: Photo, line: Prepared, folder: Path) -> Prepared:
    """Write one photo to `folder` and return its completed line.

    The file is a copy of the original if nothing has to change, and a PNG otherwise.
    """
    try:
        image = open_photo(photo.path)
    except PhotoError as error:
        line.reason = str(error)
        return line
    left, top, right, bottom = black_borders(np.asarray(image)) if line.trim else line.borders
    trimmed = image.crop((left, top, image.width - right, image.height - bottom))
    if min(trimmed.size) < MIN_SIDE_PX:
        trimmed = image
    else:
        line.borders = left, top, right, bottom
    line.phashes = photo_hashes(trimmed)
    with Image.open(photo.path) as original:
        unchanged = (
            original.mode == "RGB"
            and original.format in ("PNG", "JPEG")
            and orientation(original) == 1
            and not any(line.borders)
        )
    line.file_name = line.file_name if unchanged else str(Path(line.file_name).with_suffix(".png"))
    with atomic_file(folder / line.file_name) as temporary:
        if unchanged:
            shutil.copyfile(photo.path, temporary)
        else:
            trimmed.save(temporary, "PNG")
    return line


def output_names(photos: list[Photo], known: dict[str, str]) -> dict[str, str]:
    """Return file name -> name in corel_all/. The names are unique, even without their endings.

    Args:
        known: the names from earlier runs. These photos keep their names.
    """
    names, taken = dict(known), {Path(name).stem for name in known.values()}
    for photo in photos:
        if photo.file_name in names:
            continue
        flat = Path(photo.file_name.replace("/", "_"))
        if len(flat.name.encode()) > MAX_NAME_BYTES:
            flat = Path(hashlib.sha256(flat.name.encode()).hexdigest() + flat.suffix)
        while flat.stem in taken:
            flat = flat.with_stem(f"{flat.stem}_{flat.suffix[1:]}")
        taken.add(flat.stem)
        names[photo.file_name] = flat.name
    return names
