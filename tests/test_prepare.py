"""Preparing raw Corel photos: borders, duplicates, bad files, a second run and an interrupted run."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, make_photos, tool, tool_here
from datasets import load_dataset
from PIL import Image, ImageOps

from corel_diffusers.data import tree
from corel_diffusers.data.borders import black_borders
from corel_diffusers.data.duplicates import duplicate_groups
from corel_diffusers.data.folders import Photo
from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.prepare import output_names, prepare
from corel_diffusers.data.scenes import draw_scene
from corel_diffusers.files import UserError
from corel_diffusers.training.advice import on_borders

COREL = ROOT.parent / "shared" / "data" / "corel"


def state(folder: Path) -> dict:
    """Return the modification time and the bytes of every file below a folder."""
    return {
        str(f.relative_to(folder)): (f.stat().st_mtime_ns, f.read_bytes())
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


def run(data_dir: Path, base: Path, **flags) -> Path:
    options = {"layout": "auto", "trim_borders": True, "strict": False} | flags
    prepare(data_dir, base / "training_data", base / "figs", **options)
    return base / "training_data" / "corel"


def test_the_command_writes_the_documented_files(tmp_path):
    make_photos(tmp_path / "data" / "corel", each=12)
    before = state(tmp_path / "data")
    output = tool("prepare", "--data-dir", "data/corel", "--base-dir", tmp_path).stdout
    assert "36 photos in 3 classes (corel): 33 for training, 3 for validation" in output
    corel = tmp_path / "training_data" / "corel"
    assert state(tmp_path / "data") == before, "the original photos are only read"
    captions = json.loads((corel / "corel_all" / "captions.json").read_text())
    assert captions["0001_0001.png"] == "a photo of a sunset at sea"
    assert len(list((corel / "class_0002").glob("*.png"))) == 12
    assert (tmp_path / "figs" / "corel_dataset_samples.png").is_file()
    reference = load_dataset("imagefolder", data_dir=str(corel / "corel_all"), cache_dir=str(tmp_path / "cache"))[
        "train"
    ]
    assert len(reference) == 36
    assert set(reference.column_names) == {"image", "label", "caption"}
    all_photos, one_class = load_photos(corel / "corel_all"), load_photos(corel / "class_0002")
    assert set(one_class["validation"]["file_name"]) == {
        n for n in all_photos["validation"]["file_name"] if n.startswith("0002")
    }


def test_a_second_run_changes_nothing_and_an_interrupted_run_continues(tmp_path, monkeypatch):
    raw = make_photos(tmp_path / "raw")
    reference = state(run(raw, tmp_path / "complete"))
    run(raw, tmp_path / "complete")
    assert state(tmp_path / "complete" / "training_data" / "corel") == reference

    from corel_diffusers.data import prepare as module

    done, original = [], module.prepare_photo

    def killed(*arguments):
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(module, "prepare_photo", killed)
    with pytest.raises(KeyboardInterrupt):
        run(raw, tmp_path / "cut")
    record = tmp_path / "cut" / "training_data" / "corel" / "prepared.jsonl"
    record.write_text(record.read_text() + '{"source": "0001_00')  # an incomplete line, as a killed run leaves it
    monkeypatch.setattr(module, "prepare_photo", lambda *a: done.append(a) or original(*a))
    corel = run(raw, tmp_path / "cut")
    assert len(done) == 18, "photos that are done are not prepared again"
    contents = {name: content for name, (_, content) in state(corel).items() if "prepared.jsonl" not in name}
    assert contents == {name: content for name, (_, content) in reference.items() if "prepared.jsonl" not in name}
    run(raw, tmp_path / "cut")
    assert len(done) == 18


def test_output_names_are_unique_and_known_names_are_kept():
    photos = [Photo(Path(name), name) for name in ("1.jpeg", "1_jpg.jpg", "1.jpg", "1.JPG")]
    known = output_names(photos[:2], {})
    names = output_names(photos, known)
    assert len({Path(name).stem for name in names.values()}) == 4
    assert {name: names[name] for name in known} == known


def test_black_borders_are_measured_and_dark_photos_have_none():
    image = np.asarray(draw_scene(5, np.random.default_rng(0)).resize((200, 160)))
    framed = np.zeros((160 + 9 + 4, 200 + 12, 3), np.uint8) + 6
    framed[9:-4, 12:] = image
    left, top, right, bottom = black_borders(framed)
    assert 12 <= left <= 15
    assert 9 <= top <= 12
    assert right == 0
    assert 4 <= bottom <= 7
    assert black_borders(image) == (0, 0, 0, 0)
    night = np.linspace(0, 120, 160)[:, None, None].repeat(200, 1).repeat(3, 2).astype(np.uint8)
    assert black_borders(night) == (0, 0, 0, 0), "a photo whose brightness increases gradually has no film border"
    wide = framed.copy()
    wide[: 173 // 3] = 0
    assert black_borders(wide)[1] == 0, "a black area of a third of the photo is not a border"


def test_training_on_photos_with_black_borders_says_how_to_cut_them_off(raw_photos, tmp_path):
    photos = load_photos(raw_photos)["train"]
    assert on_borders(photos) == []
    framed = tmp_path / "framed"
    framed.mkdir()
    for index, photo in enumerate(photos["image"]):
        ImageOps.expand(photo.convert("RGB"), border=4).save(framed / f"{index}.png")
    (line,) = on_borders(load_photos(framed)["train"])
    assert "photos that were looked at have black borders: corel-diffusers prepare cuts them off" in line


def test_trimmed_photos_are_counted_and_trimming_can_be_disabled(tmp_path, capsys):
    raw = make_photos(tmp_path / "raw", size_px=(96, 96))
    framed = Image.new("RGB", (96 + 14, 96), "black")
    framed.paste(Image.open(raw / "0003_0001.png"), (7, 0))
    framed.save(raw / "0003_0001.png")
    corel = run(raw, tmp_path / "a")
    assert "black borders trimmed: 1;" in capsys.readouterr().out
    assert Image.open(corel / "corel_all" / "0003_0001.png").width <= 96
    corel = run(raw, tmp_path / "b", trim_borders=False)
    assert (corel / "corel_all" / "0003_0001.png").read_bytes() == (raw / "0003_0001.png").read_bytes()


def test_a_photo_added_later_does_not_replace_another_photo(tmp_path):
    """The new photo a.jpg is sorted before a.png. It has a border, so it becomes a PNG file."""
    raw = tmp_path / "raw"
    raw.mkdir()
    for label, name in enumerate(("a.png", "b.png", "c.png")):
        draw_scene(label, np.random.default_rng(label)).resize((96, 96)).save(raw / name)
    corel = run(raw, tmp_path)
    framed = Image.new("RGB", (96 + 14, 96), "black")
    framed.paste(draw_scene(3, np.random.default_rng(3)).resize((96, 96)), (7, 0))
    framed.save(raw / "a.jpg", quality=95)
    run(raw, tmp_path)
    assert (corel / "corel_all" / "a.png").read_bytes() == (raw / "a.png").read_bytes()
    assert Image.open(corel / "corel_all" / "a_jpg.png").width <= 96
    assert len(load_photos(corel / "corel_all")["train"]) + len(load_photos(corel / "corel_all")["validation"]) == 4


def test_duplicates_are_listed_and_kept_in_the_same_split(tmp_path):
    raw = make_photos(tmp_path / "raw", each=10, size_px=(96, 96))
    shutil.copy(raw / "0001_0001.png", raw / "0001_0011.png")
    Image.open(raw / "0001_0002.png").crop((2, 2, 94, 95)).resize((80, 80)).save(raw / "0001_0012.jpg", quality=70)
    ImageOps.mirror(Image.open(raw / "0002_0003.png")).save(raw / "0002_0013.png")
    corel = run(raw, tmp_path)
    kind_of = {
        frozenset(group["photos"]): group["kind"] for group in json.loads((corel / "duplicates.json").read_text())
    }
    assert kind_of[frozenset({"0001_0001.png", "0001_0011.png"})] == "exact"
    assert any({"0001_0002.png", "0001_0012.jpg"} <= group and kind == "near" for group, kind in kind_of.items())
    assert any({"0002_0003.png", "0002_0013.png"} <= group and kind == "near" for group, kind in kind_of.items()), (
        "a mirror image"
    )
    split = json.loads((corel / "corel_all" / "split.json").read_text())
    for group in kind_of:
        assert len({name in split["validation"] for name in group}) == 1


def test_held_out_duplicates_of_training_photos_are_told(tmp_path, capsys):
    photos = make_photos(tmp_path / "photos", classes=1, each=8)
    for split, numbers in (("train", range(1, 7)), ("val", (7, 8))):
        (tmp_path / "raw" / split).mkdir(parents=True)
        for number in numbers:
            shutil.copy(photos / f"0001_{number:04d}.png", tmp_path / "raw" / split / f"photo {number}.png")
    run(tmp_path / "raw", tmp_path / "first")
    assert "duplicates of training photos" not in capsys.readouterr().out
    shutil.copy(photos / "0001_0003.png", tmp_path / "raw" / "val" / "again.png")
    run(tmp_path / "raw", tmp_path / "second")
    assert "notice: 1 held-out photos are duplicates of training photos" in capsys.readouterr().out


def test_photos_whose_originals_are_gone_are_removed(tmp_path, capsys):
    raw = make_photos(tmp_path / "raw", each=4)
    corel = run(raw, tmp_path)
    (corel / "corel_all" / "mine.png").write_bytes((raw / "0001_0001.png").read_bytes())
    for file in [*raw.glob("0003_*.png"), raw / "0001_0002.png"]:
        file.unlink()
    (raw / "classes.txt").write_text("".join((raw / "classes.txt").read_text().splitlines(keepends=True)[:2]))
    capsys.readouterr()
    run(raw, tmp_path)
    assert "notice: 5 prepared photos were removed, because their originals are gone" in capsys.readouterr().out
    assert not (corel / "class_0003").exists()
    assert not (corel / "class_0001" / "0001_0002.png").exists()
    assert {file.name for file in (corel / "corel_all").glob("*.png")} == {file.name for file in raw.glob("*.png")} | {
        "mine.png"
    }
    run(raw, tmp_path)
    assert "removed" not in capsys.readouterr().out


def test_prepared_photos_stay_if_their_originals_are_only_left_out(tmp_path, capsys, monkeypatch):
    """A package is missing this time, or a folder cannot be read: the originals are still there."""
    raw = make_photos(tmp_path / "raw", classes=1)
    shutil.copy(raw / "0001_0001.png", raw / "0001_0009.webp")
    corel = run(raw, tmp_path)
    (corel / "class_0100").mkdir()
    (corel / "class_0100" / "metadata.jsonl").write_text("")  # of the user
    (corel / "class_0001_backup").mkdir()
    shutil.copy(corel / "corel_all" / "0001_0001.png", corel / "class_0001_backup")
    (corel / "class_notes.txt").write_text("")
    before = {file: file.read_bytes() for file in corel.rglob("*.png")}
    monkeypatch.setattr(tree, "photo_endings", lambda: (".png",))
    run(raw, tmp_path)
    assert "removed" not in capsys.readouterr().out
    assert {file: file.read_bytes() for file in corel.rglob("*.png")} == before
    assert (corel / "class_0100" / "metadata.jsonl").is_file()


def test_a_photo_that_got_another_class_moves_to_its_folder(tmp_path):
    raw = make_photos(tmp_path / "raw", classes=2, each=4)
    rows = [{"file_name": file.name, "label": "ab"[file.name[3] == "2"]} for file in sorted(raw.glob("*.png"))]
    (raw / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corel = run(raw, tmp_path)
    assert (corel / "class_0001" / "0001_0001.png").is_file()
    rows[0]["label"] = "b"
    (raw / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(raw, tmp_path)
    assert not (corel / "class_0001" / "0001_0001.png").exists()
    assert (corel / "class_0002" / "0001_0001.png").is_file()


def test_prepared_folders_load_with_unusual_captions_and_names(tmp_path):
    raw = make_photos(tmp_path / "raw", classes=1)
    (raw / "0001_0001.png").rename(raw / f"0001_{'7' * 240}.png")
    captions = {"0001_0002.png": "two lines\u2028of one caption\x85"}
    # with the byte order mark that editors on Windows write
    (raw / "captions.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(captions).encode())
    photos = load_photos(run(raw, tmp_path) / "corel_all")
    assert sum(map(len, photos.values())) == 6
    assert captions["0001_0002.png"] in [caption for part in photos.values() for caption in part["caption"]]


def test_a_border_is_not_trimmed_if_the_rest_would_be_too_small(tmp_path):
    raw = make_photos(tmp_path / "raw", classes=1)
    small = Image.fromarray(np.full((30, 60, 3), 200, np.uint8))
    ImageOps.expand(small, 3, "black").save(raw / "0001_0009.png")
    corel = run(raw, tmp_path)
    assert Image.open(corel / "corel_all" / "0001_0009.png").size == (66, 36)
    assert json.loads((corel / "skipped.json").read_text()) == {}


def test_chains_of_duplicates_are_one_group():
    groups = duplicate_groups([(word, word) for word in ("00", "ff" * 8, "01", "0f" * 8, "1ff")])
    assert groups[0] == groups[2]
    assert len(set(groups)) == 3
    near = duplicate_groups([(f"{(1 << bits) - 1:016x}",) * 2 for bits in (0, 8, 16, 40)])
    assert near[0] == near[1] == near[2] != near[3]


def test_bad_files_are_left_out_with_a_reason_and_strict_stops_at_them(tmp_path, capsys):
    raw = make_photos(tmp_path / "raw")
    good = Image.open(raw / "0001_0001.png")
    (raw / "0001_0091.png").write_bytes((raw / "0001_0001.png").read_bytes()[:300])
    (raw / "0001_0092.jpg").write_text("not an image")
    good.resize((9, 9)).save(raw / "0001_0093.png")
    good.save(raw / "0001_0094.gif", save_all=True, append_images=[good.rotate(90)])
    (raw / "notes.txt").write_text("hello")
    good.convert("CMYK").save(raw / "0001_0095.jpg")
    rgba = good.convert("RGBA")
    rgba.putalpha(128)
    rgba.rotate(90).save(raw / "0001_0096.png")
    corel = run(raw, tmp_path / "out")
    skipped = json.loads((corel / "skipped.json").read_text())
    assert set(skipped) == {"0001_0091.png", "0001_0092.jpg", "0001_0093.png", "0001_0094.gif", "notes.txt"}
    assert skipped["0001_0092.jpg"] == "not an image"
    assert "tiny" in skipped["0001_0093.png"]
    assert "animated" in skipped["0001_0094.gif"]
    assert "left out: 5" in capsys.readouterr().out
    for name in ("0001_0095.png", "0001_0096.png"):
        assert Image.open(corel / "corel_all" / name).mode == "RGB"
    with pytest.raises(UserError, match="--strict: notes.txt cannot be used"):
        run(raw, tmp_path / "strict", strict=True)
    (raw / "notes.txt").unlink()
    with pytest.raises(UserError, match="--strict: 0001_0091.png cannot be used"):
        run(raw, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists(), "nothing is written"


def test_an_output_folder_accepts_only_one_source(tmp_path):
    run(make_photos(tmp_path / "a"), tmp_path)
    with pytest.raises(UserError, match="--output-dir .* holds photos prepared from"):
        run(make_photos(tmp_path / "b"), tmp_path)


def test_bad_flags_give_a_one_line_error_and_exit_code_2(tmp_path):
    done = tool_here("prepare", "--data-dir", tmp_path / "none", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --data-dir")
    (tmp_path / "empty").mkdir()
    done = tool_here("prepare", "--data-dir", tmp_path / "empty", "--base-dir", tmp_path, check=False)
    assert done.returncode == 2
    assert "No images found in" in done.stderr
    assert ".jpeg" in done.stderr
    assert os.listdir(tmp_path) == ["empty"], "nothing is written"


@pytest.mark.skipif(not COREL.is_dir(), reason="the real Corel photos do not exist on this machine")
def test_the_real_corel_photos_are_prepared_without_losses(tmp_path, capsys):
    corel = run(COREL, tmp_path)
    output = capsys.readouterr().out
    assert "302 photos in 6 classes (corel): 271 for training, 31 for validation" in output
    assert json.loads((corel / "skipped.json").read_text()) == {}
    photos = load_photos(corel / "corel_all")
    assert photos["train"].features["label"].names == [
        "royal guard",
        "steam train",
        "dessert",
        "vegetables",
        "antarctica",
        "sunset",
    ]
