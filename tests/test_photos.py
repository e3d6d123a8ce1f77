"""Loading photos from any source: the layouts, the split and the choice of classes."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import make_photos
from datasets import ClassLabel, DatasetDict, load_dataset
from PIL import Image

from corel_diffusers.data.folders import find_photos
from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.splits import split_photos
from corel_diffusers.files import UserError


def labels_by_file(photos) -> dict[str, str]:
    """Return file name -> class name for the photos of all splits."""
    names = photos["train"].features["label"]
    return {
        name: names.int2str(label)
        for part in photos.values()
        for name, label in zip(part["file_name"], part["label"], strict=True)
    }


def flat_copies(source: Path, folder: Path, names: list[str]) -> Path:
    folder.mkdir()
    files = sorted(source.glob("*.png"))
    for index, name in enumerate(names):
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        Image.open(files[index % len(files)]).convert("RGB").save(target)
    return folder


def test_raw_corel_has_names_captions_and_both_splits(raw_photos):
    photos = load_photos(raw_photos)
    assert set(photos) == {"train", "validation"}
    assert isinstance(photos["train"].features["label"], ClassLabel)
    assert photos["train"].features["label"].names == ["sunset at sea", "snowy mountain", "pine forest"]
    assert labels_by_file(photos)["0002_0003.png"] == "snowy mountain"
    row = photos["train"][0]
    assert row["image"].size == (48, 48)
    assert row["caption"] == "a photo of a " + photos["train"].features["label"].int2str(row["label"])
    assert not set(photos["train"]["file_name"]) & set(photos["validation"]["file_name"])
    assert len(photos["train"]) + len(photos["validation"]) == 18


def test_corel_1k_class_is_number_divided_by_100(raw_photos, tmp_path, capsys):
    folder = flat_copies(raw_photos, tmp_path / "1k", [f"{n}.jpg" for n in (0, 1, 2, 100, 101, 250, 251, 999, 998)])
    photos = load_photos(folder)
    assert labels_by_file(photos)["250.jpg"] == "2"
    assert photos["train"].features["label"].names == ["0", "1", "2", "9"]
    assert "Corel-1K" in capsys.readouterr().out


def test_photos_numbered_from_1_are_flat(raw_photos, tmp_path):
    folder = flat_copies(raw_photos, tmp_path / "mine", [f"{n}.jpg" for n in range(1, 131)])
    assert find_photos(folder).layout == "flat"
    assert load_photos(folder)["train"].features["label"].names == ["photo"]


def test_class_folders_give_the_same_labels_as_imagefolder(raw_photos, tmp_path):
    folder = flat_copies(
        raw_photos, tmp_path / "folders", [f"{name}/{n}.png" for name in ("beach", "dog", "tree") for n in range(4)]
    )
    reference = load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "cache"))["train"]
    (folder / "dog" / "notes.txt").write_text("x")
    assert find_photos(folder).left_out == {"dog/notes.txt": "not an image (.txt)"}
    photos = load_photos(folder)
    assert photos["train"].features["label"].names == reference.features["label"].names
    assert labels_by_file(photos)["dog/2.png"] == "dog"


def test_class_folders_are_found_despite_photos_beside_them(raw_photos, tmp_path, capsys):
    shutil.copytree(raw_photos, tmp_path / "mine" / "sea")
    shutil.copytree(raw_photos, tmp_path / "mine" / "snow")
    shutil.copy(raw_photos / "0001_0001.png", tmp_path / "mine" / "cover.png")
    (tmp_path / "mine" / "sea" / "0001_0099.heic").write_text("x")
    photos = load_photos(tmp_path / "mine")
    assert photos["train"].features["label"].names == ["sea", "snow"]
    output = capsys.readouterr().out
    assert "1 photos outside the class folders are left out" in output
    assert "2 files are left out: sea/0001_0099.heic: a HEIC photo: pip install pillow-heif; cover.png" in output


@pytest.mark.parametrize(
    ("folders", "classes", "expected"),
    [
        (("beach", "sunset"), "1 sunset\n2 beach\n", {"beach": 2, "sunset": 1}),
        (("cats", "dogs"), "0 cats\n1 dogs\n", {"cats": 0, "dogs": 1}),
        (("cats", "dogs"), "1 sunset\n2 beach\n", {"cats": 1, "dogs": 2}),
        (("class_0002", "class_0007"), "2 beach\n9 sunset\n", {"beach": 2, "class_0007": 7}),
    ],
)
def test_class_folders_keep_their_names_and_get_numbers_from_classes_txt(
    folders, classes, expected, raw_photos, tmp_path
):
    for number, name in enumerate(folders, 1):
        (tmp_path / name).mkdir()
        for file in raw_photos.glob(f"000{number}_*.png"):
            shutil.copy(file, tmp_path / name)
    (tmp_path / "classes.txt").write_text(classes)
    found = find_photos(tmp_path)
    assert {name: number for number, name in found.classes.items()} == expected
    assert {photo.path.parent.name: photo.class_number for photo in found.photos} == dict(
        zip(folders, expected.values(), strict=True)
    )
    assert load_photos(tmp_path)["train"].features["label"].names == list(found.classes.values())


def test_nested_photos_are_reported_and_folders_of_the_toolkit_are_ignored(raw_photos, tmp_path, capsys):
    for name in ("sea", "snow", "vae_models", "figs"):
        shutil.copytree(raw_photos, tmp_path / name)
    (tmp_path / "vae_models" / "run.json").write_text("{}")
    (tmp_path / "figs" / "corel_dataset_samples.png").write_bytes(b"")
    shutil.copytree(raw_photos, tmp_path / "generated_images_individual")
    shutil.copytree(raw_photos, tmp_path / "training_data" / "corel" / "corel_all")
    (tmp_path / "training_data" / "corel" / "source.json").write_text("{}")
    assert load_photos(tmp_path)["train"].features["label"].names == ["sea", "snow"]
    assert "deeper" not in capsys.readouterr().out
    shutil.copytree(raw_photos, tmp_path / "snow" / "2020" / "may")
    assert load_photos(tmp_path)["train"].features["label"].names == ["sea", "snow"]
    assert (
        "18 photos lie deeper than their class folder, for example snow/2020/may/0001_0001.png"
        in capsys.readouterr().out
    )


@pytest.mark.skipif(os.name != "posix", reason="only POSIX allows file names that are not UTF-8")
def test_a_file_name_that_is_not_utf_8_is_left_out_and_reported(raw_photos, tmp_path, capsys):
    folder = tmp_path / "mine"
    shutil.copytree(raw_photos, folder)
    shutil.copy(raw_photos / "0001_0001.png", os.fsencode(folder) + b"/caf\xe9.png")
    assert len(labels_by_file(load_photos(folder))) == 18
    assert "1 files are left out: caf\ufffd.png: its name has bytes that are not UTF-8" in capsys.readouterr().out
    for name, target in (("sea", b"a.png"), ("snow", b"b.png"), ("cafe", b"\xe9.png")):
        (tmp_path / "more" / name).mkdir(parents=True)
        for index, file in enumerate(raw_photos.glob("0001*.png")):
            shutil.copy(file, os.fsencode(tmp_path / "more" / name) + b"/%d" % index + target)
    assert load_photos(tmp_path / "more")["train"].features["label"].names == ["sea", "snow"]
    assert "6 files are left out: cafe/" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="only POSIX allows names with control characters")
def test_control_characters_in_names_end_in_one_line(raw_photos, tmp_path):
    """A newline would break classes.txt, and an escape sequence could rewrite the screen."""
    for name in ("sea", "sn\now"):
        shutil.copytree(raw_photos, tmp_path / "folders" / name)
    with pytest.raises(UserError, match="name of the folder sn\ufffdow/ has bytes that are not UTF-8, or control char"):
        load_photos(tmp_path / "folders")
    shutil.copytree(raw_photos, tmp_path / "rows")
    rows = [{"file_name": file.name, "label": "sea\x1b[2J"} for file in raw_photos.glob("*.png")]
    (tmp_path / "rows" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"the class name 'sea\\x1b\[2J' has a control character"):
        load_photos(tmp_path / "rows")


@pytest.mark.skipif(os.name != "posix", reason="Windows needs a permission to make links")
def test_links_to_each_other_are_left_out(raw_photos, tmp_path, capsys):
    folder = tmp_path / "mine"
    shutil.copytree(raw_photos, folder)
    (folder / "x.png").symlink_to("y.png")
    (folder / "y.png").symlink_to("x.png")
    assert len(labels_by_file(load_photos(folder))) == 18
    assert "2 photos are links to files that are not here" in capsys.readouterr().out


def test_flat_folder_uses_captions_json(raw_photos, tmp_path):
    folder = flat_copies(raw_photos, tmp_path / "flat", ["a.png", "b.png", "c.png"])
    (folder / "captions.json").write_text(json.dumps({"b.png": "my cat"}))
    photos = load_photos(folder)
    captions = {
        name: caption
        for part in photos.values()
        for name, caption in zip(part["file_name"], part["caption"], strict=True)
    }
    assert captions == {"a.png": "a photo", "b.png": "my cat", "c.png": "a photo"}


def test_without_classes_txt_the_class_numbers_are_the_names(raw_photos, tmp_path, capsys):
    folder = tmp_path / "bare"
    shutil.copytree(raw_photos, folder)
    (folder / "classes.txt").unlink()
    assert load_photos(folder)["train"].features["label"].names == ["1", "2", "3"]
    assert "the number is used as the name" in capsys.readouterr().out


def test_classes_are_kept_by_name_or_number_and_relabelled(raw_photos):
    all_photos = load_photos(raw_photos)
    kept = load_photos(raw_photos, classes=["3", "sunset at sea"])
    assert kept["train"].features["label"].names == ["sunset at sea", "pine forest"]
    expected = {name: label for name, label in labels_by_file(all_photos).items() if label != "snowy mountain"}
    assert labels_by_file(kept) == expected
    assert set(kept["validation"]["file_name"]) <= set(all_photos["validation"]["file_name"]), (
        "the split must not depend on --classes"
    )
    with pytest.raises(UserError, match="1 sunset at sea, 2 snowy mountain, 3 pine forest"):
        load_photos(raw_photos, classes=["moon"])
    assert load_photos(raw_photos, classes="pine forest")["train"].features["label"].names == ["pine forest"]


def test_max_train_samples_does_not_change_the_validation_photos(raw_photos):
    few, all_photos = load_photos(raw_photos, max_train_samples=5), load_photos(raw_photos)
    assert len(few["train"]) == 5
    assert few["validation"]["file_name"][:] == all_photos["validation"]["file_name"][:]


def test_split_is_stratified_stable_and_keeps_groups_together():
    labels = [0] * 40 + [1] * 10 + [2]
    names = [f"{n}.png" for n in range(51)]
    splits = split_photos(labels, names)
    held_out = [labels[i] for i, split in enumerate(splits) if split == "validation"]
    assert held_out.count(0) == 4
    assert held_out.count(1) == 1
    assert held_out.count(2) == 0, "the only photo of a class is a training photo"
    more = split_photos([*labels, 0], [*names, "new.png"])
    assert sum(a != b for a, b in zip(splits, more, strict=False)) <= 1, (
        "adding a photo changes the split of at most one other photo"
    )
    groups = [i // 2 for i in range(51)]
    grouped = split_photos(labels, names, groups)
    assert all(grouped[i] == grouped[i + 1] for i in range(0, 50, 2))
    assert "validation" in grouped
    pairs = split_photos([0] * 6, [f"{n}.png" for n in range(6)], [0, 0, 1, 1, 2, 2])
    assert pairs.count("validation") == 2, (
        "a group larger than the validation fraction is held out if no group is smaller"
    )
    for burst in range(6):  # fifteen frames of one series and five photos, with the series at each place in the order
        groups = [burst] * 15 + [n for n in range(6) if n != burst]
        splits = split_photos([0] * 20, [f"{group}-{index}.png" for index, group in enumerate(groups)], groups)
        assert splits[:15] == ["train"] * 15
        assert splits.count("validation") == 2


def test_a_prepared_folder_uses_its_split_json(raw_photos, tmp_path):
    folder = tmp_path / "prepared"
    shutil.copytree(raw_photos, folder)
    files = sorted(f.name for f in folder.glob("*.png"))
    rows = [{"file_name": name, "label": "b" if name < "0002" else "a", "caption": f"c {name}"} for name in files]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "classes.txt").write_text("7 b\n9 a\n")
    (folder / "split.json").write_text(json.dumps({"train": files[3:], "validation": files[:3]}))
    photos = load_photos(folder)
    assert photos["validation"]["file_name"][:] == files[:3]
    assert photos["train"].features["label"].names == ["b", "a"], "in the order of classes.txt"
    assert [len(part) for part in load_photos(folder, classes=["9"]).values()] == [11, 1], (
        "split.json holds out no photo of this class: a new split is made"
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"notes.txt": "x"}, r"No images found in .*: looked for \.png \.jpg"),
        ({"0001_0001.png": "x", "classes.txt": "1 one\ntwo\n"}, "classes.txt line 2"),
        ({"a.png": "x", "captions.json": "[1"}, "not valid JSON"),
        ({"metadata.jsonl": '{"file_name": "gone.png"}\n'}, "gone.png, which does not exist"),
    ],
)
def test_a_folder_that_cannot_be_loaded_gives_a_one_line_error(tmp_path, content, expected):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=expected) as error:
        load_photos(tmp_path)
    assert "\n" not in str(error.value)


def test_a_hub_dataset_is_read_by_its_column_types(raw_photos, tmp_path, monkeypatch):
    """`load_dataset` returns a local imagefolder here: the loader gets the same type of object as from the Hub."""
    folder = flat_copies(
        raw_photos, tmp_path / "folders", [f"{name}/{n}.png" for name in ("beach", "dog") for n in range(5)]
    )
    loaded = load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr("corel_diffusers.data.datasets_library.load_dataset", lambda repo_id, config: loaded)
    photos = load_photos("somebody/photos")
    assert photos["train"].features["label"].names == ["beach", "dog"]
    assert sorted(photos["train"].column_names) == ["caption", "file_name", "image", "label"]
    assert len(photos["train"]) == 8
    assert len(photos["validation"]) == 2
    for part in photos.values():
        for row in part:
            assert row["caption"] == f"a photo of a {part.features['label'].int2str(row['label'])}"


def test_a_hub_split_without_labels_is_not_held_out(raw_photos, tmp_path, monkeypatch):
    folder = flat_copies(
        raw_photos, tmp_path / "folders", [f"{name}/{n}.png" for name in ("beach", "dog") for n in range(5)]
    )
    loaded = load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
    unlabelled = loaded["train"].map(lambda row: {"label": -1})
    monkeypatch.setattr(
        "corel_diffusers.data.datasets_library.load_dataset",
        lambda repo_id, config: DatasetDict(train=loaded["train"], test=unlabelled),
    )
    assert {split: len(part) for split, part in load_photos("somebody/photos").items()} == {"train": 8, "validation": 2}


def test_a_hub_dataset_with_unlabelled_training_photos_is_refused(raw_photos, tmp_path, monkeypatch):
    folder = flat_copies(
        raw_photos, tmp_path / "folders", [f"{name}/{n}.png" for name in ("beach", "dog") for n in range(4)]
    )
    train = load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "cache"))["train"]
    one_unlabelled = train.map(lambda row, index: {"label": -1 if index == 3 else row["label"]}, with_indices=True)
    monkeypatch.setattr(
        "corel_diffusers.data.datasets_library.load_dataset", lambda repo_id, config: DatasetDict(train=one_unlabelled)
    )
    with pytest.raises(UserError, match="some photos of its train split have no label"):
        load_photos("user/photos")


def test_make_photos_writes_the_raw_corel_layout(tmp_path):
    assert find_photos(make_photos(tmp_path / "x", classes=2, each=3)).classes == {
        1: "sunset at sea",
        2: "snowy mountain",
    }
