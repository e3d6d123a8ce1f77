"""The Python API: the examples of its docstrings, and its functions on small models."""

import doctest
import gc
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from conftest import ROOT, make_photos
from datasets import DatasetDict
from diffusers import AutoencoderKL

import corel_diffusers as cd
from corel_diffusers import api
from corel_diffusers.config.train import Train
from corel_diffusers.files import UserError


def test_the_package_is_imported_without_torch():
    code = "import sys, corel_diffusers as cd; assert 'train' in dir(cd); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = cd.nothing


def test_the_example_of_train_runs(tmp_path, monkeypatch):
    """With a few steps in place of its minutes, so that it also ends on a slow machine."""
    commands = Train.commands

    def with_few_steps(args: Train) -> Iterator[list[str]]:
        for words in commands(args):
            if "--max-train-minutes" in words:
                words[-2:] = ["--max-train-steps", "4", "--batch-size", "4", "--mixed-precision", "no"]
                words += ["--attention", "fused"]
            if words[0] == "train-vae":
                words += ["--image-size", "32"]
            yield words

    monkeypatch.setattr(Train, "commands", with_few_steps)
    make_photos(tmp_path / "photos", each=18)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the scripts are beside the package
    names = {}
    for example in doctest.DocTestParser().get_examples(api.train.__doc__):
        if example.want:
            assert repr(eval(example.source, names)) == example.want.strip()
        else:
            exec(example.source, names)
    run = api.TrainedRun(tmp_path / "vae_models", tmp_path / "diffusion_models")
    assert run.metrics[-1]["val_loss"] > 0
    assert run.evaluation["generation"]["n"][0] == 6
    assert [file.name for file in run.pictures] == ["training_losses.png", "loss_history.png", "grid.png"]


def test_models_and_photos_are_built_by_name(raw_photos):
    assert isinstance(cd.load_photos(raw_photos), DatasetDict)
    vae = cd.build_vae("tiny", (32, 32))
    assert isinstance(vae, AutoencoderKL)
    assert cd.build_unet("tiny", (32, 32), vae, num_classes=3).config.num_class_embeds == 4


def test_the_commands_are_functions(trained_unet, trained_vae, raw_photos, tmp_path, capsys):
    folder = cd.prepare(raw_photos, output_dir=str(tmp_path / "prepared"), visualize=False)
    assert (folder / "metadata.jsonl").is_file()
    images = cd.generate(trained_unet, 2, steps=2, seed=0, output=str(tmp_path / "grid.png"))
    assert [image.size for image in images] == [(32, 32)] * 2
    results = cd.evaluate(
        trained_unet, raw_photos, num_images=4, steps=2, against="all", output_dir=str(tmp_path / "evaluation")
    )
    assert results["generation"]["n"] == [4, 18]
    assert cd.push(trained_unet, "user/name", dry_run=True) is None
    assert "would push" in capsys.readouterr().out
    cd.push(trained_vae, "user/name", dry_run=True)
    assert "  config.json\n" in capsys.readouterr().out


def test_the_garbage_collector_works_as_before_for_the_caller(trained_unet, tmp_path):
    """Frozen objects of a notebook would never be collected."""
    frozen = gc.get_freeze_count()
    cd.generate(trained_unet, 1, steps=1, output=tmp_path / "grid.png")
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen
    gc.disable()
    try:
        cd.generate(trained_unet, 1, steps=1, output=tmp_path / "grid.png")
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_values_are_taken_as_people_write_them(trained_unet, tmp_path):
    run = api.TrainedRun(tmp_path, trained_unet)
    images = cd.generate(run, 1, class_="pine forest", size=32, steps=1, output=tmp_path / "grid.png")
    assert images[0].size == (32, 32)
    assert len(cd.generate(run, 1, class_=2, steps=1, output=tmp_path / "grid.png")) == 1
    cd.push(run, "user/name", dry_run=True)


@pytest.mark.parametrize(
    ("call", "error", "expected"),
    [
        (lambda folder: cd.generate(folder, num_image=3), UserError, "--num-image, 3: perhaps you meant --num-images"),
        (
            lambda folder: cd.train("scenes", epochs=5),
            UserError,
            "unrecognized options: --epochs, 5 .see corel-diffusers",
        ),
        (lambda folder: cd.generate(folder, "12x"), UserError, "--num-images: .*expected --num-images INT"),
        (lambda folder: cd.evaluate(folder, "scenes", features=3), UserError, "choice '3' for argument '--features'"),
        (lambda folder: cd.push(folder, "user/name", private="yes"), UserError, "unrecognized options: yes"),
        (lambda folder: cd.generate(None), TypeError, "NoneType: give the folder of a pipeline"),
    ],
)
def test_a_wrong_keyword_is_named(call, error, expected, trained_unet):
    with pytest.raises(error, match=expected):
        call(trained_unet)


def test_a_wrong_flag_raises_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--minutes -1.0: give a number above 0"):
        cd.train("scenes", minutes=-1)
    with pytest.raises(UserError, match="is not a folder"):
        cd.train(tmp_path / "missing")
    (tmp_path / "photos.zip").touch()
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(UserError, match="is an archive: unpack it"):
        cd.train(f"{tmp_path.name}/photos.zip")
    with pytest.raises(UserError, match="minutes None: give a number above 0"):
        cd.train("scenes", minutes=None)
    with pytest.raises(
        TypeError, match="DatasetDict: give a folder of photos .* becomes a folder with its save_to_dis"
    ):
        cd.train(DatasetDict())


def test_generate_works_from_a_thread(trained_unet, tmp_path):
    images = []
    thread = threading.Thread(
        target=lambda: images.extend(cd.generate(trained_unet, 1, steps=1, output=str(tmp_path / "grid.png")))
    )
    thread.start()
    thread.join()
    assert len(images) == 1
