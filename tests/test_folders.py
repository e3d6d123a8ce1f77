"""Folders of photos as people have them: splits, metadata files, deeper folders, names, and what is not a photo."""

import json
import os
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from conftest import COREL_5K
from datasets import Dataset, load_dataset
from PIL import Image
from pyarrow import parquet

from corel_diffusers.config.checks import require_data_dir, user_path
from corel_diffusers.data.corel5k import class_names, read_words
from corel_diffusers.data.datasets_library import load_from_hub
from corel_diffusers.data.folders import find_photos
from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.pixels import cache_pixels
from corel_diffusers.files import UserError, write_json


def draw(folder: Path, *names: str) -> Path:
    """Write a different photo of 40 x 40 px under each name."""
    for index, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(file)
    return folder


def by_file(folder: Path) -> dict[str, tuple[str, str | None]]:
    """Return file name -> class name and split."""
    found = find_photos(folder)
    return {photo.file_name: (found.classes.get(photo.class_number, "photo"), photo.split) for photo in found.photos}


def test_folders_of_splits_are_no_classes(tmp_path):
    names = [f"{split}/{n}.png" for split, count in (("train", 8), ("val", 3)) for n in range(count)]
    photos = load_photos(draw(tmp_path, *names))
    assert photos["train"].features["label"].names == ["photo"]
    assert {split: sorted(part["file_name"][:]) for split, part in photos.items()} == {
        "train": names[:8],
        "validation": names[8:],
    }


def test_a_test_folder_is_held_back_and_validation_photos_are_chosen_from_the_others(tmp_path):
    names = [f"{split}/{name}/{n}.png" for split in ("training", "test") for name in ("cat", "dog") for n in range(5)]
    photos = load_photos(draw(tmp_path / "deep" / "down", *names).parent)
    assert photos["train"].features["label"].names == ["cat", "dog"]
    assert {split: len(part) for split, part in photos.items()} == {"train": 8, "validation": 2, "test": 10}
    assert all("/test/" in f"/{name}" for name in photos["test"]["file_name"][:])


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_metadata_files_give_labels_captions_and_splits_like_imagefolder(kind, tmp_path):
    for split, count in (("train", 6), ("test", 2)):
        folder = draw(tmp_path / "photos" / split, *(f"{n}.png" for n in range(count)))
        rows = [{"file_name": f"{n}.png", "label": "ab"[n % 2], "text": f"caption {n}"} for n in range(count)]
        if kind == "jsonl":
            (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif kind == "csv":
            Dataset.from_list(rows).to_csv(folder / "metadata.csv", index=False)
        else:
            Dataset.from_list(rows).to_parquet(folder / "metadata.parquet")
    photos = load_photos(tmp_path / "photos")
    try:
        reference = load_dataset("imagefolder", data_dir=str(tmp_path / "photos"), cache_dir=str(tmp_path / "cache"))
    except Exception as error:  # datasets 4.0 cannot read the text columns of a table from pandas 3
        if kind != "csv" or "file_name" not in str(error):
            raise
        pytest.skip(f"this version of datasets cannot read metadata.csv: {error}")
    assert len(photos["test"]) == len(reference["test"])
    rows = [row for part in (photos["train"], photos["validation"]) for row in part]
    names = photos["train"].features["label"].names
    ours = sorted((row["caption"], names[row["label"]]) for row in rows)
    assert ours == sorted((row["text"], row["label"]) for row in reference["train"])


def test_several_captions_of_a_photo_are_one_photo(tmp_path, capsys):
    folder = draw(tmp_path, *(f"{n}.png" for n in range(8)))
    rows = [{"file_name": f"{n}.png", "text": f"caption {c}"} for n in range(8) for c in range(5)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    photos = load_photos(folder)
    assert sum(map(len, photos.values())) == 8
    assert set(photos["train"]["caption"][:]) == {"caption 0"}
    assert "up to 5 captions" in capsys.readouterr().out


def test_photos_without_a_row_and_rows_without_a_photo_are_told(tmp_path, capsys):
    folder = draw(tmp_path, *(f"{n}.png" for n in range(6)))
    rows = [{"file_name": f"{n}.png", "label": "ab"[n % 2]} for n in (0, 1, 2, 3, 7)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sum(map(len, load_photos(folder).values())) == 4
    output = capsys.readouterr().out
    assert "1 photos of metadata.jsonl are missing, for example 7.png" in output
    assert "2 photos have no row in metadata.jsonl, for example 4.png: they are left out" in output


def test_a_row_that_names_a_file_outside_the_folder_is_refused(tmp_path):
    draw(tmp_path, "outside.png")
    folder = draw(tmp_path / "photos", "a.png", "b.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "../outside.png"}\n{"file_name": "a.png"}\n')
    with pytest.raises(UserError, match=r"'\.\./outside\.png' lies outside the folder of photos: copy it"):
        by_file(folder)


def test_numbered_folders_keep_their_numbers_and_their_order(tmp_path):
    folder = draw(tmp_path, *(f"{number}/{n}.png" for number in range(12) for n in range(3)))
    found = find_photos(folder)
    assert found.classes == {number: str(number) for number in range(12)}
    assert load_photos(folder)["train"].features["label"].names == [str(number) for number in range(12)]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.png", "b.png"], {"photo"}),
        (["DCIM/100CANON/a.png", "DCIM/101CANON/b.png"], {"photo"}),
        (["DCIM/100CANON/a.png", "DCIM/100CANON/b.png"], {"photo"}),
        (["a.png", "DCIM/100CANON/b.png", "DCIM/101CANON/c.png"], {"photo"}),
        (["photos/pets/cat/a.png", "photos/pets/dog/b.png"], {"cat", "dog"}),
        (["cat/2020/a.png", "cat/b.png", "dog/c.png"], {"cat", "dog"}),
        (["cat/a.png", "cat/b.png"], {"cat"}),
        ([f"{n}.png" for n in range(1, 351) if n not in (17, 118, 266)], {"photo"}),
        ([f"{n}.png" for n in range(1000, 1020)], {"photo"}),
        ([f"{cd}{n:03d}.png" for cd in (1, 21, 384) for n in range(4)], {"1", "21", "384"}),
    ],
)
def test_the_layout_follows_from_the_names(names, expected, tmp_path):
    assert {class_name for class_name, _ in by_file(draw(tmp_path, *names)).values()} == expected


def test_neighbours_of_photos_are_ignored(tmp_path):
    folder = draw(tmp_path, "cat/a.png", "dog/b.png", "__MACOSX/cat/a.png", ".hidden/c.png", "@eaDir/d.png")
    (folder / "cat" / "Thumbs.db").write_bytes(b"x")
    found = find_photos(folder)
    assert found.classes == {1: "cat", 2: "dog"}
    assert not found.left_out


def test_links_that_lead_nowhere_and_links_in_a_circle_are_told_or_ignored(tmp_path):
    folder = draw(tmp_path, "a.png", "b.png")
    (folder / "c.png").symlink_to("../.git/annex/objects/gone")
    (folder / "again").symlink_to(folder)
    found = find_photos(folder)
    assert len(found.photos) == 2
    assert found.left_out == {"c.png": "a link to a missing file"}
    assert "1 photos are links to files that are not here" in " ".join(found.notices)


@pytest.mark.parametrize("level", [".", "corel"])
def test_one_level_too_high_reads_the_prepared_photos(level, tmp_path):
    draw(tmp_path / "corel" / "corel_all", "a.png", "b.png")
    draw(tmp_path / "corel" / "class_0001", "a.png")
    write_json(tmp_path / "corel" / "source.json", {})
    assert set(by_file(tmp_path / level)) == {"a.png", "b.png"}


def test_an_archive_is_named(tmp_path):
    draw(tmp_path / "photos", "a.png")
    for folder in (tmp_path, tmp_path / "only"):
        folder.mkdir(exist_ok=True)
        with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
            archive.write(tmp_path / "photos" / "a.png", "a.png")
    with pytest.raises(UserError, match=r"photos\.zip is an archive: unpack it"):
        require_data_dir(tmp_path / "photos.zip")
    with pytest.raises(UserError, match=r"it has 1 an archive \(\.zip\): unpack it"):
        find_photos(tmp_path / "only")


def test_a_class_that_loses_all_photos_is_an_error(tmp_path):
    folder = draw(tmp_path / "heic", "cat/a.png", "dog/b.png")
    (folder / "horse").mkdir()
    (folder / "horse" / "IMG_1.cr2").write_bytes(b"x")
    with pytest.raises(UserError, match=r"class folder horse can be opened \(1 a raw photo of a camera"):
        find_photos(folder)
    folder = draw(tmp_path / "damaged", *(f"{name}/{n}.png" for name in ("cat", "dog") for n in range(3)))
    for file in (folder / "dog").iterdir():
        file.write_bytes(b"x")
    with pytest.raises(UserError, match="no photo of the class dog can be read"):
        cache_pixels(load_photos(folder), (32, 32))


def test_a_classes_txt_of_another_program_is_ignored(tmp_path):
    folder = draw(tmp_path, "cat/a.png", "dog/b.png")
    (folder / "classes.txt").write_text("cat\ndog\n")
    found = find_photos(folder)
    assert found.classes == {1: "cat", 2: "dog"}
    assert "classes.txt is ignored" in " ".join(found.notices)


def test_composed_and_decomposed_names_are_the_same(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    folder = draw(tmp_path, f"{decomposed}.png", "b.png")
    (folder / "metadata.jsonl").write_text(f'{{"file_name": "{composed}.png", "label": "x"}}\n', "utf-8")
    assert by_file(folder) == {f"{composed}.png": ("x", None)}


def test_words_in_file_names_are_offered_as_classes(tmp_path):
    folder = draw(tmp_path, *(f"{word}_{n:02d}.png" for word in ("cat", "dog") for n in range(3)))
    assert "file names begin with 2 words (cat, dog)" in " ".join(find_photos(folder).notices)
    assert find_photos(folder, "names").classes == {1: "cat", 2: "dog"}


def test_the_home_folder_is_known(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path(".", "~/photos") == tmp_path / "photos"
    assert user_path("~", "photos") == tmp_path / "photos"


def test_the_classes_of_corel_5k_are_named_by_their_words(tmp_path, capsys):
    names = [f"{cd}{n:03d}.png" for cd in (108, 113) for n in range(4)]
    folder = draw(tmp_path, *names)
    (folder / "words").write_bytes(b"grass\r\ntiger\r\nhorse\r\nwater\r\n")
    lines = [f"{cd}{n:03d} {2 if cd == 108 else 3} {1 if n % 2 else 4}   \r\n" for cd in (108, 113) for n in range(4)]
    (folder / "training_label").write_text("".join(lines))
    found = find_photos(folder)
    assert found.layout == "corel-5k"
    assert {number: name.split()[0] for number, name in found.classes.items()} == {108: "tiger", 113: "horse"}
    assert next(photo.caption for photo in found.photos if photo.file_name == "108001.png") == "tiger, grass"
    assert class_names({1: [["a", "b"]], 2: [["b", "a"]]}) == {1: "a b 1", 2: "a b 2"}, "each class has its own name"


@pytest.mark.skipif(not COREL_5K.is_dir(), reason="the photos of Corel-5K do not exist on this machine")
def test_corel_5k_has_fifty_named_classes_in_order():
    found = find_photos(COREL_5K)
    assert len(found.classes) == len(set(found.classes.values())) == 50
    assert list(found.classes) == sorted(found.classes)
    assert found.classes[108] == "tiger cat"
    assert len(found.photos) == 4500
    assert all(photo.caption for photo in found.photos)
    assert len(read_words(COREL_5K)) == 4500


def test_what_datasets_has_written_is_read(tmp_path):
    draw(tmp_path / "photos", *(f"{name}/{n}.png" for name in ("cat", "dog") for n in range(5)))
    loaded = load_dataset("imagefolder", data_dir=str(tmp_path / "photos"), cache_dir=str(tmp_path / "cache"))
    loaded.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "parquet").mkdir()
    loaded["train"].to_parquet(str(tmp_path / "parquet" / "train-00000-of-00001.parquet"))
    for folder in ("saved", "parquet"):
        photos = load_photos(tmp_path / folder)
        assert photos["train"].features["label"].names == ["cat", "dog"], folder
        assert {split: len(part) for split, part in photos.items()} == {"train": 8, "validation": 2}


def test_one_configuration_of_a_dataset_is_loaded(tmp_path):
    """A folder with the header of a card is loaded by `datasets` as a repository of the Hub is."""
    draw(tmp_path, *(f"{name}/{n}.png" for name in ("cats", "dogs") for n in range(5)))
    configs = "".join(f"- config_name: {name}\n  data_dir: {name}\n" for name in ("cats", "dogs"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    photos, _ = load_from_hub(f"{tmp_path}:dogs")
    expected = {np.asarray(Image.open(file)).tobytes() for file in (tmp_path / "dogs").iterdir()}
    assert {np.asarray(image).tobytes() for part in photos.values() for image in part["image"]} == expected
    with pytest.raises(UserError, match=r"several configurations \(cats, dogs\): give --dataset-name .*:config"):
        load_from_hub(str(tmp_path))


def names(*folders: str) -> list[str]:
    return [f"{folder}/{n}.png" for folder in folders for n in range(2)]


@pytest.mark.parametrize(
    ("files", "classes", "splits"),
    [
        ([*names("train/cat", "train/dog", "val/cat"), "cover.png"], {"cat", "dog"}, {"train": 4, "validation": 2}),
        (names("Train/cat", "TEST/cat", "unlabeled"), {"cat"}, {"train": 2, "test": 2}),
        (names("cat/train", "dog/train", "cat/test"), {"cat", "dog"}, {"train": 4, "test": 2}),
    ],
)
def test_split_folders_are_found_beside_other_files_and_inside_class_folders(files, classes, splits, tmp_path):
    found = by_file(draw(tmp_path, *files))
    assert {class_name for class_name, _ in found.values()} == classes
    assert {split: [s for _, s in found.values()].count(split) for split in splits} == splits
    assert sum(splits.values()) == len(found)


def test_a_column_gives_the_splits_and_captions_alone_keep_the_class_folders(tmp_path):
    folder = draw(tmp_path / "splits", "a.png", "b.png")
    rows = [{"file_name": "a.png", "label": 1.0, "split": "train"}, {"file_name": "b.png", "label": 2, "split": "Test"}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert by_file(folder) == {"a.png": ("1", "train"), "b.png": ("2", "test")}
    folder = draw(tmp_path / "captions", "cat/a.png", "dog/b.png")
    (folder / "metadata.csv").write_text('file_name, text\ncat/a.png, "one\nline"\ndog/b.png, two\n')
    found = find_photos(folder)
    assert found.classes == {1: "cat", 2: "dog"}
    assert [photo.caption for photo in found.photos] == ["one\nline", "two"]


def test_corel_1k_in_a_folder_of_its_own_keeps_its_classes(tmp_path):
    folder = draw(tmp_path, *(f"image.orig/{n}.jpg" for n in (0, 1, 100, 250, 999)))
    assert set(find_photos(folder).classes) == {0, 1, 2, 9}


def test_an_archive_or_a_table_beside_photos_does_not_replace_them(tmp_path):
    folder = draw(tmp_path, "cat/a.png", "cat/c.png", "dog/b.png", "dog/d.png")
    (folder / "backup.tar").write_bytes(b"x")
    assert load_photos(folder)["train"].features["label"].names == ["cat", "dog"]


def test_a_folder_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    folder = draw(tmp_path / "photos", "cat/a.png", "dog/b.png")
    (folder / "private").mkdir(mode=0o000)
    original = os.scandir

    def refuse(path):
        if Path(path).name == "private":
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = find_photos(folder)
    assert found.classes == {1: "cat", 2: "dog"}
    assert "private/ cannot be read (Permission denied)" in " ".join(found.notices)


@pytest.mark.parametrize(
    ("photos", "closed", "lost"),
    [
        (["cats/a.png", "dogs/b.png"], ["cats/raw/a.cr2"], None),
        (["cats/x.png", "dogs/2020/b.png"], ["birds/2020/c.heic"], "birds"),
        (names("cats/train", "cats/val"), ["dogs/train/a.heic", "dogs/val/b.heic"], "dogs"),
    ],
)
def test_photos_that_cannot_be_opened_belong_to_their_class(photos, closed, lost, tmp_path):
    draw(tmp_path, *photos)
    for name in closed:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    if lost:
        with pytest.raises(UserError, match=f"class folder {lost} can be opened"):
            find_photos(tmp_path)
    else:
        assert find_photos(tmp_path).classes == {1: "cats", 2: "dogs"}


def test_captions_json_is_read_beside_labels_and_in_each_folder(tmp_path):
    folder = draw(tmp_path, "train/a.png", "train/b.png", "val/c.png")
    (folder / "metadata.csv").write_text("file_name,label\ntrain/a.png,x\ntrain/b.png,y\nval/c.png,x\n")
    write_json(folder / "captions.json", {"train/a.png": "one"})
    write_json(folder / "val" / "captions.json", {"c.png": "three"})
    assert [photo.caption for photo in find_photos(folder).photos] == ["one", None, "three"]


def test_missing_labels_and_repeated_rows_of_a_table(tmp_path):
    folder = draw(tmp_path, *(f"{name}.png" for name in "abcd"))
    text = (
        "file_name,label,split,text\na.png,x,test,one\na.png,,,two\nb.png,y,train,\nc.png,-1,train,\nd.png,nan,train,\n"
    )
    (folder / "metadata.csv").write_text(text)
    found = find_photos(folder)
    assert by_file(folder) == {"a.png": ("x", "test"), "b.png": ("y", "train")}
    assert found.left_out == dict.fromkeys(("c.png", "d.png"), "no label in metadata.csv")
    assert not any("no row" in notice for notice in find_photos(folder, "flat").notices)


def test_a_link_to_a_folder_that_is_read_already_is_told(tmp_path):
    folder = draw(tmp_path, "zebra/a.png", "lion/b.png")
    (folder / "animal").symlink_to(folder / "zebra")
    found = find_photos(folder)
    assert found.classes == {1: "lion", 2: "zebra"}
    assert "animal/ is a link to a folder that is read already" in " ".join(found.notices)


@pytest.mark.parametrize(
    ("train", "held_out", "split"),
    [
        ("train2017", "val2017", "validation"),
        ("train_images", "test-images", "test"),
        ("images_train", "images_val", "validation"),
    ],
)
def test_folders_of_splits_can_have_a_year_or_another_word_in_their_names(train, held_out, split, tmp_path):
    found = by_file(draw(tmp_path, *names(train, held_out)))
    assert {class_name for class_name, _ in found.values()} == {"photo"}
    assert [found[f"{folder}/0.png"][1] for folder in (train, held_out)] == ["train", split]


def test_a_class_whose_name_contains_a_split_is_a_class(tmp_path):
    found = by_file(draw(tmp_path, *names("steam train", "test_tube", "train")))
    assert {class_name for class_name, _ in found.values()} == {"steam train", "test_tube", "train"}


@pytest.mark.parametrize(("encoding", "delimiter"), [("utf-16", "\t"), ("utf-8-sig", ";"), ("utf-8", ",")])
def test_tables_of_spreadsheets_are_read(encoding, delimiter, tmp_path):
    draw(tmp_path, *(f"{n}.png" for n in range(6)))
    rows = [("file_name", "label"), *((f"{n}.png", ("Käse", "Brot")[n % 2]) for n in range(6))]
    (tmp_path / "metadata.csv").write_text("".join(delimiter.join(row) + "\n" for row in rows), encoding=encoding)
    assert {class_name for class_name, _ in by_file(tmp_path).values()} == {"Käse", "Brot"}


@pytest.mark.parametrize("as_objects", [True, False])
def test_plain_bytes_in_a_table_are_photos(as_objects, tmp_path):
    draw(tmp_path / "photos", *(f"{n}.png" for n in range(10)))
    contents = [(tmp_path / "photos" / f"{n}.png").read_bytes() for n in range(10)]
    column = [{"bytes": content, "path": None} for content in contents] if as_objects else contents
    (tmp_path / "table").mkdir()
    table = pyarrow.table({"image": column, "label": ["cat", "dog"] * 5})
    parquet.write_table(table, tmp_path / "table" / "train.parquet")
    photos = load_photos(tmp_path / "table")
    assert photos["train"].features["label"].names == ["cat", "dog"]
    assert {split: len(part) for split, part in photos.items()} == {"train": 8, "validation": 2}
    assert photos["train"][0]["image"].size == (40, 40)


def test_names_that_begin_with_a_year_are_no_classes(tmp_path):
    assert find_photos(draw(tmp_path / "years", "2019_0007.png", "2020_0001.png")).layout == "flat"
    assert find_photos(draw(tmp_path / "corel", "0001_0007.png", "2020_0001.png")).layout == "corel"
    (draw(tmp_path / "named", "2019_0007.png", "2020_0001.png") / "classes.txt").write_text("2019 sea\n2020 snow\n")
    assert find_photos(tmp_path / "named").layout == "corel"
