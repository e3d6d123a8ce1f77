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
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from corel_diffusers.data.duplicates import duplicate_groups, photo_hashes
from corel_diffusers.data.photos import SHEET, SPLITS, FolderContents, Photo, default_caption, find_photos, split_photos
from corel_diffusers.data.transforms import MIN_SIDE_PX, PhotoError, open_photo, orientation
from corel_diffusers.files import UserError, atomic_file, read_json, write_json, write_text
from corel_diffusers.plots import SHEET_PX, contact_sheet, save_picture

DARK = 32  # a row or column is black film if its 90th percentile of brightness (0 to 255) is below this
JUMP = 24  # black film ends with at least this jump in brightness; the brightness of a dark photo increases gradually
MAX_BORDER = 0.1  # maximum border, as a fraction of the side; a wider black area is part of the photo
MAX_NAME_BYTES = 240  # file systems allow 255, and endings are added to names
BATCH_PHOTOS = 64  # photos given to the threads at a time: an interruption loses the work on at most this many


@dataclass
class Prepared:
    """How one photo was prepared: a line of prepared.jsonl."""

    source: str
    size: int
    changed: int  # modification time of the source, nanoseconds
    trim: bool
    file_name: str
    borders: tuple[int, int, int, int] = (0, 0, 0, 0)  # left, top, right, bottom, px
    phashes: tuple[str, str] = ("", "")  # of the photo and its mirror image
    reason: str = ""  # why the photo was left out; empty if it was not


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
    if (data_dir / "metadata.jsonl").is_file():
        raise UserError(f"--data-dir {data_dir} is already prepared (it has metadata.jsonl): train on it directly")
    found = find_photos(data_dir, layout)
    if len(found.photos) < 2:
        raise UserError(f"{data_dir} holds one photo: at least two are needed, one of them for validation")
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
    groups = duplicate_groups([done[photo.file_name].phashes for photo in photos])
    num_duplicates = write_duplicates(corel, photos, groups)
    split_names = split_photos(
        [photo.class_number for photo in photos], [photo.file_name for photo in photos], groups, test_fraction
    )
    write_folders(corel, found, photos, [done[photo.file_name].file_name for photo in photos], split_names)
    if figs_dir:
        draw_sheet(figs_dir / SHEET, corel / "corel_all", found, photos, done)

    for notice in found.notices:
        print(f"notice: {notice}")
    trimmed = sum(any(done[photo.file_name].borders) for photo in photos)
    counts = f"{split_names.count('train')} for training, {split_names.count('validation')} for validation" + (
        f", {split_names.count('test')} for testing" if "test" in split_names else ""
    )
    print(f"{len(photos)} photos in {max(1, len(found.classes))} classes ({found.layout}): {counts}")
    print(f"black borders trimmed: {trimmed}; duplicates kept in the same split: {num_duplicates}")
    if skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(skipped.values()).most_common(5))
        print(f"left out: {len(skipped)} ({reasons}), see {corel / 'skipped.json'}")
    print(f"prepared: {corel / 'corel_all'}")


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


def read_prepared(record: Path) -> Iterable[Prepared]:
    """Yield the lines of prepared.jsonl, without a line that is incomplete because the run was killed."""
    for line in record.read_text(encoding="utf-8").splitlines() if record.is_file() else ():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "phashes" in values:  # otherwise an older version wrote the line, and the photo is prepared again
            yield Prepared(**values | {name: tuple(values[name]) for name in ("borders", "phashes")})


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


def black_borders(image: np.ndarray) -> tuple[int, int, int, int]:
    """Return the widths in px of the black film borders of an RGB image (H, W, 3): left, top, right, bottom.

    A border consists of dark rows or columns at the edge (DARK). It ends with a jump in brightness (JUMP) within
    MAX_BORDER of the side. A dark sky or table is wider, or its brightness increases gradually, so it is not a border.
    The widths include the soft edge of the film.
    """
    brightness = image.max(axis=2).astype(np.float32)

    def border(lines: np.ndarray) -> int:
        levels = np.percentile(lines[: int(MAX_BORDER * len(lines)) + 6], 90, axis=1)
        dark = int(np.argmax(levels >= DARK)) if (levels >= DARK).any() else len(levels)
        if dark < 2 or dark > MAX_BORDER * len(lines):
            return 0
        jump = levels[min(dark + 3, len(levels) - 1)] - levels[dark - 1]
        return dark + 2 if jump >= JUMP else 0

    rows, columns = brightness, brightness.T
    return border(columns), border(rows), border(columns[::-1]), border(rows[::-1])


def write_duplicates(corel: Path, photos: list[Photo], groups: list[int]) -> int:
    """Write duplicates.json, a list of duplicate groups, and return the number of photos in them.

    The kind of a group is "exact" if all its files have the same bytes, and "near" otherwise.
    """
    members = defaultdict(list)
    for photo, group in zip(photos, groups, strict=True):
        members[group].append(photo)
    duplicates = []
    for same in members.values():
        if len(same) > 1:
            exact = len({hashlib.sha256(photo.path.read_bytes()).digest() for photo in same}) == 1
            duplicates.append({"kind": "exact" if exact else "near", "photos": [photo.file_name for photo in same]})
    write_json(corel / "duplicates.json", duplicates)
    return sum(len(group["photos"]) for group in duplicates)


def write_folders(
    corel: Path, found: FolderContents, photos: list[Photo], file_names: list[str], split_names: list[str]
) -> None:
    """Write the list files of corel_all/, and class_0001/ and so on with the photos and list files of one class.

    The photos of a class folder are hard links if the disk supports hard links, and copies otherwise.
    """
    rows = []
    for photo, name, split in zip(photos, file_names, split_names, strict=True):
        label = found.classes.get(photo.class_number, "photo")
        caption = photo.caption or default_caption(found.classes.get(photo.class_number))
        rows.append(({"file_name": name, "label": label, "caption": caption}, split, photo.class_number))
    write_lists(corel / "corel_all", rows, found.classes)
    for number, class_name in found.classes.items():
        folder = corel / f"class_{number:04d}"
        folder.mkdir(exist_ok=True)
        of_class = [row for row in rows if row[2] == number]
        for values, _, _ in of_class:
            link_or_copy(corel / "corel_all" / values["file_name"], folder / values["file_name"])
        if of_class:
            write_lists(folder, of_class, {number: class_name})


def write_lists(folder: Path, rows: list[tuple[dict, str, int | None]], classes: dict[int, str]) -> None:
    """Write metadata.jsonl (the format of `datasets`), captions.json, split.json and classes.txt.

    Args:
        rows: the metadata, the split and the class number of each photo.
    """
    text = "".join(json.dumps(values, ensure_ascii=False) + "\n" for values, _, _ in rows)
    write_text(folder / "metadata.jsonl", text)
    write_json(folder / "captions.json", {values["file_name"]: values["caption"] for values, _, _ in rows})
    splits = {name: [values["file_name"] for values, split, _ in rows if split == name] for name in SPLITS}
    write_json(folder / "split.json", {name: files for name, files in splits.items() if files or name != "test"})
    if classes:
        write_text(folder / "classes.txt", "".join(f"{number} {name}\n" for number, name in classes.items()))


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy if links are not possible. Do nothing if it is one already."""
    if target.is_file() and (target.samefile(source) or target.read_bytes() == source.read_bytes()):
        return
    with atomic_file(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def draw_sheet(path: Path, folder: Path, found: FolderContents, photos: list[Photo], done: dict[str, Prepared]) -> None:
    """Draw the contact sheet: up to eight photos of each class, with the name of the class and its number of photos."""
    rows = {}
    for number in list(found.classes) or [None]:
        of_class = [photo for photo in photos if photo.class_number == number]
        shown = of_class[:: max(1, len(of_class) // 8)][:8]
        images = [open_photo(folder / done[photo.file_name].file_name) for photo in shown]
        for image in images:  # the photos of all classes in full size might not fit in memory
            image.thumbnail((SHEET_PX, SHEET_PX), Image.Resampling.LANCZOS)
        rows[f"{found.classes.get(number, 'photos')} ({len(of_class)})"] = images
    save_picture(contact_sheet(rows), path)
