"""Raw Corel -> imagefolders: `corel-diffusers prepare`.

Writes `<output>/corel/corel_all/` and `class_0001/` and so on, each with its photos, metadata.jsonl, captions.json, split.json and
classes.txt, and a contact sheet. Originals are only read. What was done to each photo is one line in `prepared.jsonl`: a second
run skips what has its line, so an interrupted run goes on and a finished one changes nothing.
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
from corel_diffusers.data.photos import SHEET, SPLITS, Found, Photo, default_caption, find_photos, split_photos
from corel_diffusers.data.transforms import MIN_SIDE_PX, PhotoError, open_photo, orientation
from corel_diffusers.files import UserError, read_json, whole_file, write_json, write_text
from corel_diffusers.plots import SHEET_PX, contact_sheet, save_picture

DARK = 32  # a line whose 90th percentile of brightness is below this, of 255, is black film
JUMP = 24  # and the film ends with a jump of at least this, where a dark picture grows lighter by and by
MAX_BORDER = 0.1  # of the side; more black than this is the picture's own
LONGEST_NAME = 240  # bytes; file systems allow 255, and files grow endings
AT_ONCE = 64  # photos are given to the threads: so many at most are done in vain when the user interrupts


@dataclass
class Prepared:
    """What was done to one photo: a line of prepared.jsonl."""

    source: str
    size: int
    changed: int  # nanoseconds
    trim: bool
    file_name: str
    borders: tuple[int, int, int, int] = (0, 0, 0, 0)  # left, top, right, bottom, px
    phashes: tuple[str, str] = ("", "")  # of the photo and of its mirror image
    reason: str = ""  # why it was left out


def prepare(
    data_dir: Path, output_dir: Path, figs_dir: Path | None, layout: str, trim_borders: bool, strict: bool, test_fraction: float = 0.0
) -> None:
    """Prepares the photos below `data_dir`; prints a summary. Raises UserError with the way out, `strict` on any bad photo."""
    if (data_dir / "metadata.jsonl").is_file():
        raise UserError(f"--data-dir {data_dir} is prepared already (it has metadata.jsonl): train on it as it is")
    found = find_photos(data_dir, layout)
    if len(found.photos) < 2:
        raise UserError(f"{data_dir} holds one photo: two or more are needed, one of them to validate on")
    if strict:
        refuse_bad_photos(found)
    corel = output_dir / "corel"
    check_same_source(corel, data_dir)
    (corel / "corel_all").mkdir(parents=True, exist_ok=True)
    done = prepare_photos(found, corel, trim_borders)

    skipped = found.not_photos | {photo.file_name: done[photo.file_name].reason for photo in found.photos if done[photo.file_name].reason}
    write_json(corel / "skipped.json", skipped)
    photos = [photo for photo in found.photos if not done[photo.file_name].reason]
    if len(photos) < 2:
        raise UserError(f"No images found in {data_dir} that can be used: {'; '.join(f'{n}: {r}' for n, r in list(skipped.items())[:3])}")
    groups = duplicate_groups([done[photo.file_name].phashes for photo in photos])
    repeated = list_duplicates(corel, photos, groups)
    sides = split_photos([photo.number for photo in photos], [photo.file_name for photo in photos], groups, test_fraction)
    write_folders(corel, found, photos, [done[photo.file_name].file_name for photo in photos], sides)
    if figs_dir:
        draw_sheet(figs_dir / SHEET, corel / "corel_all", found, photos, done)

    for notice in found.notices:
        print(f"notice: {notice}")
    trimmed = sum(any(done[photo.file_name].borders) for photo in photos)
    sizes = f"{sides.count('train')} to train, {sides.count('validation')} held out" + (
        f", {sides.count('test')} to report on" if "test" in sides else ""
    )
    print(f"{len(photos)} photos in {max(1, len(found.classes))} classes ({found.layout}): {sizes}")
    print(f"black borders trimmed: {trimmed}; duplicates kept on one side: {repeated}")
    if skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(skipped.values()).most_common(5))
        print(f"left out: {len(skipped)} ({reasons}), see {corel / 'skipped.json'}")
    print(f"prepared: {corel / 'corel_all'}")


def refuse_bad_photos(found: Found) -> None:
    """Opens every photo before anything is written; the first file that cannot serve as one ends the run."""
    for name, reason in found.not_photos.items():
        raise UserError(f"--strict: {name} cannot be used ({reason}): remove it, or leave out --strict")
    for photo in tqdm(found.photos, "checking", leave=False, disable=None):
        try:
            open_photo(photo.path)
        except PhotoError as error:
            raise UserError(f"--strict: {photo.file_name} cannot be used ({error}): remove it, or leave out --strict") from None


def check_same_source(corel: Path, data_dir: Path) -> None:
    """Refuses to mix the photos of two sources in one output folder."""
    record = corel / "source.json"
    try:
        source = {"data_dir": os.path.relpath(data_dir.resolve(), corel.resolve())}
    except ValueError:  # on another drive
        source = {"data_dir": str(data_dir.resolve())}
    if record.is_file() and read_json(record) != source:
        raise UserError(f"--output-dir {corel.parent} holds photos prepared from another folder (see {record}): give another one")
    write_json(record, source)


def prepare_photos(found: Found, corel: Path, trim_borders: bool) -> dict[str, Prepared]:
    """Converts and trims each photo into corel_all/, skipping those whose line says that it is done; file name -> its line."""
    record = corel / "prepared.jsonl"
    done = {line.source: line for line in read_prepared(record)}
    write_text(record, "".join(json.dumps(asdict(line)) + "\n" for line in done.values()))  # without a line that a kill cut off
    names, to_do = output_names(found.photos, {line.source: line.file_name for line in done.values()}), []
    for photo in found.photos:
        stat = photo.path.stat()
        line = done.get(photo.file_name)
        stamp = (stat.st_size, stat.st_mtime_ns, trim_borders)
        if line and (line.size, line.changed, line.trim) == stamp and (line.reason or (corel / "corel_all" / line.file_name).is_file()):
            continue
        to_do.append((photo, Prepared(photo.file_name, *stamp, names[photo.file_name])))
    with (
        record.open("a", encoding="utf-8") as log,
        ThreadPoolExecutor() as pool,  # Pillow works outside the interpreter's lock
        tqdm(desc="preparing", total=len(to_do), unit=" photos", leave=False, disable=None) as bar,
    ):
        for start in range(0, len(to_do), AT_ONCE):
            for line in pool.map(lambda both: prepare_photo(*both, corel / "corel_all"), to_do[start : start + AT_ONCE]):
                done[line.source] = line
                log.write(json.dumps(asdict(line)) + "\n")
                log.flush()
                bar.update()
    return done


def prepare_photo(photo: Photo, line: Prepared, folder: Path) -> Prepared:
    """One photo -> its file in `folder`: a copy where nothing has to change, else a PNG."""
    try:
        picture = open_photo(photo.path)
    except PhotoError as error:
        line.reason = str(error)
        return line
    left, top, right, bottom = black_borders(np.asarray(picture)) if line.trim else line.borders
    trimmed = picture.crop((left, top, picture.width - right, picture.height - bottom))
    if min(trimmed.size) < MIN_SIDE_PX:
        trimmed = picture
    else:
        line.borders = left, top, right, bottom
    line.phashes = photo_hashes(trimmed)
    with Image.open(photo.path) as original:
        as_it_is = original.mode == "RGB" and original.format in ("PNG", "JPEG") and orientation(original) == 1 and not any(line.borders)
    line.file_name = line.file_name if as_it_is else str(Path(line.file_name).with_suffix(".png"))
    with whole_file(folder / line.file_name) as beside:
        if as_it_is:
            shutil.copyfile(photo.path, beside)
        else:
            trimmed.save(beside, "PNG")
    return line


def read_prepared(record: Path) -> Iterable[Prepared]:
    """The lines of prepared.jsonl; one cut off by a kill is left out."""
    for line in record.read_text(encoding="utf-8").splitlines() if record.is_file() else ():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "phashes" in values:  # else it is an earlier version's, and the photo is prepared again
            yield Prepared(**values | {name: tuple(values[name]) for name in ("borders", "phashes")})


def output_names(photos: list[Photo], known: dict[str, str]) -> dict[str, str]:
    """File name -> name in corel_all/: flat, and no two alike, not even with another ending. What has a name by now keeps it."""
    names, taken = dict(known), {Path(name).stem for name in known.values()}
    for photo in photos:
        if photo.file_name in names:
            continue
        flat = Path(photo.file_name.replace("/", "_"))
        if len(flat.name.encode()) > LONGEST_NAME:
            flat = Path(hashlib.sha256(flat.name.encode()).hexdigest() + flat.suffix)
        while flat.stem in taken:
            flat = flat.with_stem(f"{flat.stem}_{flat.suffix[1:]}")
        taken.add(flat.stem)
        names[photo.file_name] = flat.name
    return names


def black_borders(picture: np.ndarray) -> tuple[int, int, int, int]:
    """Width in px of the black film border at the left, top, right and bottom of an RGB picture (H, W, 3), the soft edge included.

    A border is a run of dark lines from the edge (DARK) that ends with a jump in brightness (JUMP) within MAX_BORDER of the
    side: a dark sky or table is wider, or grows lighter by and by, and stays.
    """
    brightness = picture.max(axis=2).astype(np.float32)

    def border(lines: np.ndarray) -> int:
        levels = np.percentile(lines[: int(MAX_BORDER * len(lines)) + 6], 90, axis=1)
        dark = int(np.argmax(levels >= DARK)) if (levels >= DARK).any() else len(levels)
        if dark < 2 or dark > MAX_BORDER * len(lines):
            return 0
        jump = levels[min(dark + 3, len(levels) - 1)] - levels[dark - 1]
        return dark + 2 if jump >= JUMP else 0

    rows, columns = brightness, brightness.T
    return border(columns), border(rows), border(columns[::-1]), border(rows[::-1])


def list_duplicates(corel: Path, photos: list[Photo], groups: list[int]) -> int:
    """Writes duplicates.json, a list of groups: exact copies by their bytes, near ones by their hashes; returns the photos in them."""
    members = defaultdict(list)
    for photo, group in zip(photos, groups, strict=True):
        members[group].append(photo)
    listed = []
    for alike in members.values():
        if len(alike) > 1:
            exact = len({hashlib.sha256(photo.path.read_bytes()).digest() for photo in alike}) == 1
            listed.append({"kind": "exact" if exact else "near", "photos": [photo.file_name for photo in alike]})
    write_json(corel / "duplicates.json", listed)
    return sum(len(group["photos"]) for group in listed)


def write_folders(corel: Path, found: Found, photos: list[Photo], file_names: list[str], sides: list[str]) -> None:
    """The lists of corel_all/, and class_0001/ and so on with the photos and lists of one class (hard links where the disk has them)."""
    rows = []
    for photo, name, side in zip(photos, file_names, sides, strict=True):
        label = found.classes.get(photo.number, "photo")
        caption = photo.caption or default_caption(found.classes.get(photo.number))
        rows.append(({"file_name": name, "label": label, "caption": caption}, side, photo.number))
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
    """metadata.jsonl for `datasets`, the guide's captions.json, split.json and classes.txt."""
    text = "".join(json.dumps(values, ensure_ascii=False) + "\n" for values, _, _ in rows)
    write_text(folder / "metadata.jsonl", text)
    write_json(folder / "captions.json", {values["file_name"]: values["caption"] for values, _, _ in rows})
    split = {s: [values["file_name"] for values, side, _ in rows if side == s] for s in SPLITS}
    write_json(folder / "split.json", {side: names for side, names in split.items() if names or side != "test"})
    if classes:
        write_text(folder / "classes.txt", "".join(f"{number} {name}\n" for number, name in classes.items()))


def link_or_copy(source: Path, target: Path) -> None:
    """`target` becomes the same file as `source`, or a copy where links are not to be had; left alone where it is already."""
    if target.is_file() and (target.samefile(source) or target.read_bytes() == source.read_bytes()):
        return
    with whole_file(target) as beside:
        try:
            os.link(source, beside)
        except OSError:
            shutil.copyfile(source, beside)


def draw_sheet(path: Path, folder: Path, found: Found, photos: list[Photo], done: dict[str, Prepared]) -> None:
    """The contact sheet: eight photos of each class with its name and count."""
    rows = {}
    for number in list(found.classes) or [None]:
        of_class = [photo for photo in photos if photo.number == number]
        shown = of_class[:: max(1, len(of_class) // 8)][:8]
        pictures = [open_photo(folder / done[photo.file_name].file_name) for photo in shown]
        for picture in pictures:  # those of all classes at their own size would fill the memory
            picture.thumbnail((SHEET_PX, SHEET_PX), Image.Resampling.LANCZOS)
        rows[f"{found.classes.get(number, 'photos')} ({len(of_class)})"] = pictures
    save_picture(contact_sheet(rows), path)
