"""What people type by habit: flags of diffusers' examples, files with flags, calls of other pipelines, notebooks."""

import json
import os
import sys
from importlib import metadata

import pytest
import torch
from conftest import ROOT, launch, make_photos, run_here, script, tool, tool_here
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from corel_diffusers import __version__
from corel_diffusers.cli import run_train
from corel_diffusers.config.checks import flag_name
from corel_diffusers.config.commands import Evaluate, Generate
from corel_diffusers.config.other_flags import FLAGS, SAMPLING_FLAGS, translate
from corel_diffusers.config.parsing import parse_command, with_config_file
from corel_diffusers.config.train import Train
from corel_diffusers.config.unet import UNetArguments
from corel_diffusers.config.vae import VAEArguments
from corel_diffusers.files import UserError, write_json

OURS = {flag_name(name) for kind in (VAEArguments, UNetArguments) for name in kind.__dataclass_fields__}


@pytest.mark.parametrize("name", FLAGS)
def test_each_flag_of_the_examples_is_ours_accepted_or_refused(name, capsys, monkeypatch):
    other = FLAGS[name]
    monkeypatch.setenv("HF_TOKEN", "")  # it is restored after the test
    assert [bool(other.ours), bool(other.always), bool(other.instead), bool(other.variable)].count(True) == 1
    assert name not in OURS, "a flag of ours needs no translation"
    document = (ROOT / "docs" / "from-diffusers.md").read_text()
    row = next(
        line
        for line in document.splitlines()
        if line.startswith(f"| `{name.replace('-', '_').replace('__', '--', 1)}` |")
    )
    words = [name.replace("-", "_").replace("__", "--", 1), *(["7"] if other.has_value else []), "--seed", "3"]
    if other.instead:
        assert other.instead in row
        with pytest.raises(UserError, match="has no meaning here: ") as refused:
            translate(words)
        assert other.instead in str(refused.value)
        return
    translated = translate(words)
    assert translated[-2:] == ["--seed", "3"]
    if other.ours:
        assert other.ours in OURS
        assert f"`{other.ours}`" in row
        assert translated[:-2] == [other.ours, *(["7"] if other.has_value else [])]
        assert translate([f"{name}=7"]) == ([f"{other.ours}", "7"] if other.has_value else [other.ours])
    else:
        assert translated == ["--seed", "3"]
    if other.always:
        assert other.always in row
        assert f"changes nothing: {other.always}" in capsys.readouterr().out
    if other.variable:
        assert os.environ[other.variable] == "7"


@pytest.mark.parametrize("name", SAMPLING_FLAGS)
def test_generate_and_evaluate_understand_the_flags_of_other_programs(name, trained_unet, raw_photos, tmp_path):
    ours = SAMPLING_FLAGS[name].ours[2:].replace("-", "_")
    typed = name.replace("-", "_").replace("__", "--", 1)
    assert f"`{typed}`" in (ROOT / "docs" / "from-diffusers.md").read_text()
    for kind, more in ((Generate, []), (Evaluate, ["--data-dir", str(raw_photos)])):
        words = ["--pipeline", str(trained_unet), "--base-dir", str(tmp_path), *more, typed, "7"]
        assert getattr(parse_command(kind, words, "corel-diffusers"), ours) == 7


def test_values_with_another_name_are_translated():
    assert translate(["--ddpm_beta_schedule", "squaredcos_cap_v2"]) == ["--schedule", "cosine"]
    assert translate(["--rec_loss=l2"]) == ["--reconstruction", "mse"]
    assert translate(["--objective", "pred_v"]) == ["--prediction-type", "v_prediction"]
    with pytest.raises(UserError, match="--resolution needs a value"):
        translate(["--resolution"])


def test_a_flag_without_a_value_may_have_true_or_false(capsys):
    assert translate(["--use_ema", "True", "--seed", "3"]) == ["--ema", "--seed", "3"]
    assert translate(["--use_ema=False"]) == ["--no-ema"]
    assert translate(["--enable_bucket", "false"]) == []
    assert translate(["--amp", "True", "--random_flip", "False"]) == []
    assert "--random_flip changes nothing: half of the photos are mirrored" in capsys.readouterr().out


def test_the_commands_of_the_examples_run(raw_photos, configs, trained_vae, tmp_path, capsys):
    """The commands of the READMEs in diffusers/examples, with another script name and small numbers."""
    words = [
        f"--train_data_dir={raw_photos}", "--model_config_name_or_path", configs / "unet.json", "--vae-checkpoint",
        trained_vae, "--center_crop", "--random_flip", f"--output_dir={tmp_path / 'unet'}", "--train_batch_size=4",
        "--max_train_steps=4", "--gradient_accumulation_steps=1", "--use_ema", "--learning_rate=1e-4",
        "--lr_warmup_steps=2", "--mixed_precision=no", "--checkpointing_steps=2",
    ]  # fmt: skip
    run_here("train_unet", words)
    assert "notice: --random_flip changes nothing" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "unet" / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    without_meaning = ["--image_column=img", "--validation_image", "a.jpg", "b.jpg", "--decoder_only"]
    with pytest.raises(UserError) as refused:
        run_here("train_vae", ["--train_data_dir", raw_photos, *without_meaning])
    assert str(refused.value).split("; ") == [
        "--image_column has no meaning here: omit it: the first column of images is used",
        "--validation_image has no meaning here: omit it: held-out photos are reconstructed",
        "--decoder_only has no meaning here: omit it: encoder and decoder are trained together",
    ]


@pytest.mark.parametrize("name", ["train_vae", "train_unet"])
def test_without_photos_one_line_says_what_to_give(name, trained_vae):
    flags = ["--vae-checkpoint", trained_vae] if name == "train_unet" else []
    done = script(name, *flags, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --data-dir is missing: give a folder of photos")
    assert done.stderr.count("\n") == 1


def test_a_file_gives_flags_and_the_command_line_wins(vae_flags, raw_photos, configs, tmp_path):
    (tmp_path / "flags.yaml").write_text(
        f"data-dir: {raw_photos}\nconfig: {configs / 'vae.json'}\nimage_size: 32\nema: false\nmax-train-steps: 2\n"
        "mixed-precision: 'no'\nperceptual: false\nclasses: [1, 2]\nbatch-size: 2\n"
    )
    run_here("train_vae", ["--config_file", tmp_path / "flags.yaml", "--batch-size", 4, "--output-dir", tmp_path / "a"])
    flags = json.loads((tmp_path / "a" / "run.json").read_text())["flags"]
    assert flags["batch_size"] == 4
    assert flags["ema"] is False
    assert flags["classes"] == ["1", "2"]
    run_here("train_vae", ["--config-file", tmp_path / "a" / "run.json", "--output-dir", tmp_path / "b"])
    weights = [load_file(tmp_path / run / "diffusion_pytorch_model.safetensors") for run in "ab"]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "no such file"), ("- 1\n- 2\n", "expected lines such as"), ("a: [", "is not valid YAML")],
)
def test_a_wrong_file_of_flags_is_one_line(content, expected, tmp_path):
    if content:
        (tmp_path / "flags.yaml").write_text(content)
    with pytest.raises(UserError, match=expected):
        with_config_file(["--config-file", str(tmp_path / "flags.yaml")], VAEArguments)


def test_the_backend_of_a_notebook_does_not_end_a_run(vae_flags, tmp_path):
    notebook = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    script("train_vae", *vae_flags, "--max-train-steps", 1, "--output-dir", tmp_path, env=notebook)
    assert (tmp_path / "training_losses.png").is_file()


def test_a_folder_of_caches_that_cannot_be_written_to_is_named(vae_flags, tmp_path):
    (tmp_path / "file").write_text("")
    done = script("train_vae", *vae_flags, "--output-dir", tmp_path, env={"HF_HOME": tmp_path / "file"}, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: HF_HOME: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("first", "arguments", "count"),
    [
        (("snowy mountain",), {}, 1),
        (("snowy mountain",), {"num_images": 2}, 2),
        (("snowy mountain", 2), {}, 2),
        ((["snowy mountain", "sunset at sea"],), {}, 2),
        ((), {"class_labels": ["snowy mountain", "sunset at sea", "sunset at sea"]}, 3),
        ((), {"batch_size": 2}, 2),
        ((2,), {"class_labels": "snowy mountain"}, 2),
        ((), {"num_images": 3, "class_labels": 1}, 3),
        ((), {}, 1),
    ],
)
def test_the_first_calls_that_people_try_draw(first, arguments, count, trained_unet):
    pipe = DiffusionPipeline.from_pretrained(trained_unet, trust_remote_code=True)
    assert len(pipe(*first, **arguments, num_inference_steps=1).images) == count


@pytest.mark.parametrize(
    ("first", "arguments", "expected"),
    [
        (("snowy mountain",), {"class_labels": "sunset at sea"}, "give the classes once"),
        ((2,), {"num_images": 3}, "give the number of images once"),
    ],
)
def test_what_is_given_twice_is_refused(first, arguments, expected, trained_unet):
    pipe = DiffusionPipeline.from_pretrained(trained_unet, trust_remote_code=True)
    with pytest.raises(ValueError, match=expected):
        pipe(*first, **arguments)


@pytest.mark.parametrize("num_images", [0, -1, 1.5])
def test_a_wrong_number_of_images_says_what_to_give(num_images, trained_unet):
    pipe = DiffusionPipeline.from_pretrained(trained_unet, trust_remote_code=True)
    with pytest.raises(ValueError, match="give the number of images, 1 or more, and the class as class_labels"):
        pipe(num_images)


def test_a_run_begins_with_trained_weights(trained_vae, trained_unet, vae_flags, unet_flags, tmp_path, capsys):
    """With a learning rate of almost 0, the weights after one step are those of the trained model."""
    still = ["--max-train-steps", 1, "--lr", 1e-12, "--lr-min", 0, "--weight-decay", 0, "--no-ema"]
    run_here("train_vae", [*vae_flags, *still, "--init-from", trained_vae, "--output-dir", tmp_path / "vae"])
    name = "diffusion_pytorch_model.safetensors"
    before, after = load_file(trained_vae / name), load_file(tmp_path / "vae" / name)
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)

    more = make_photos(tmp_path / "photos", classes=4)
    flags = [*unet_flags, *still, "--init-from", trained_unet, "--output-dir", tmp_path / "unet", "--data-dir", more]
    flags.remove("--image-dir")
    flags.pop(0)
    run_here("train_unet", flags)
    assert "new classes: " in capsys.readouterr().out
    before, after = (load_file(folder / "unet" / name) for folder in (trained_unet, tmp_path / "unet"))
    for key in before:
        if key != "class_embedding.weight":
            assert torch.allclose(before[key], after[key], atol=1e-6), key
    old, new = before["class_embedding.weight"], after["class_embedding.weight"]
    assert torch.allclose(new[:3], old[:3], atol=1e-6), "classes that are known"
    assert torch.allclose(new[3], old[3], atol=1e-6), "a new class begins with the null label"
    assert torch.allclose(new[4], old[3], atol=1e-6), "the null label"
    seen = (tmp_path / "vae" / "training_photos.txt").read_text().splitlines()
    assert set((trained_vae / "training_photos.txt").read_text().splitlines()) <= set(seen)


def test_weights_of_another_model_are_refused(trained_vae, trained_unet, vae_flags, unet_flags, tmp_path):
    step = ["--max-train-steps", 1, "--no-ema"]
    flags = [*vae_flags, *step, "--config", "tiny", "--init-from", trained_vae, "--output-dir", tmp_path / "vae"]
    with pytest.raises(UserError, match="the model has another config, give it as --config"):
        run_here("train_vae", flags)
    run_here("train_vae", [*vae_flags, *step, "--seed", 7, "--no-perceptual", "--output-dir", tmp_path / "other"])
    flags = [*unet_flags, *step, "--vae-checkpoint", tmp_path / "other", "--init-from", trained_unet]
    with pytest.raises(UserError, match=f"give --vae-checkpoint {trained_unet / 'vae'}"):
        run_here("train_unet", [*flags, "--output-dir", tmp_path / "unet"])


def test_train_divides_its_minutes_and_goes_on_with_the_same_command(tmp_path):
    """tests/test_api.py runs these commands."""
    args = Train(data_dir="scenes", minutes=60, output_dir=str(tmp_path), image_size="32", aspect_buckets=True)
    vae, unet, tuning, evaluation = args.checked().commands()
    folders = [str(tmp_path / "vae_models"), str(tmp_path / "diffusion_models")]
    assert [words[0] for words in (vae, unet, tuning, evaluation)] == [
        "train-vae", "train-unet", "tune-decoder", "evaluate",
    ]  # fmt: skip
    assert tuning[-2:] == ["--minutes", "2"]
    for words, minutes, folder in ((vae, "19.3333", folders[0]), (unet, "38.6667", folders[1])):
        assert words[words.index("--max-train-minutes") + 1] == minutes
        assert words[words.index("--output-dir") + 1] == folder
        assert words[words.index("--resume") + 1] == "latest"
        assert "--aspect-buckets" in words
    assert unet[unet.index("--vae-checkpoint") + 1] == folders[0]
    assert evaluation[evaluation.index("--pipeline") + 1] == folders[1]


def test_a_short_run_does_not_tune_the_decoder():
    commands = [words[0] for words in Train(data_dir="scenes", minutes=14).commands()]
    assert commands == ["train-vae", "train-unet", "evaluate"]


def test_a_decoder_that_is_tuned_is_not_tuned_again(tmp_path, monkeypatch):
    write_json(tmp_path / "diffusion_models" / "run.json", {"data": {"photos": {"validation": 9}}})
    for tuning, expected in (({"steps": 9}, False), (None, True)):
        monkeypatch.setattr("corel_diffusers.cli.decoder_tuning", lambda folder, tuning=tuning: tuning)
        started = []
        run_train(Train(data_dir="scenes", output_dir=str(tmp_path)), started.append)
        assert ("tune-decoder" in [words[0] for words in started]) == expected


def test_more_minutes_go_to_the_unet_once_it_trains_on_the_latents_of_the_vae(tmp_path):
    """A VAE that is trained further has other latents, and the UNet could not continue."""
    folders = Train(data_dir="scenes", output_dir=str(tmp_path)).folders()
    for folder, minutes in zip(folders, (2.0, 4.0), strict=True):
        write_json(folder / "run.json", {"flags": {"max_train_minutes": minutes}})
    for minutes, expected in ((6, "4"), (20, "16"), (3, "2")):
        unet, *_ = Train(data_dir="scenes", minutes=minutes, output_dir=str(tmp_path)).commands()
        assert unet[0] == "train-unet"
        assert unet[unet.index("--max-train-minutes") + 1] == expected


def test_of_several_processes_only_the_main_one_evaluates(tmp_path, monkeypatch):
    """`accelerate launch` and `notebook_launcher` start several processes, which train together."""
    (tmp_path / "diffusion_models").mkdir()
    write_json(tmp_path / "diffusion_models" / "run.json", {"data": {"photos": {"validation": 9}}})
    args = Train(data_dir="scenes", output_dir=str(tmp_path))
    training = ["train-vae", "train-unet"]
    for rank, expected in (("0", [*training, "tune-decoder", "evaluate"]), ("1", training)):
        monkeypatch.setenv("RANK", rank)
        started = []
        run_train(args, lambda words, started=started: started.append(words[0]))
        assert started == expected


def test_a_pipeline_that_is_evaluated_is_not_evaluated_again(tmp_path, monkeypatch, capsys):
    pipeline = tmp_path / "diffusion_models"
    pipeline.mkdir()
    write_json(pipeline / "run.json", {"data": {"photos": {"validation": 9}}})
    monkeypatch.setattr("corel_diffusers.hub.cards.weights_digests", lambda folder: {"unet_sha256": "new"})
    for weights, num_images, expected in (("new", 300, False), ("new", 50, True), ("old", 300, True)):
        write_json(pipeline / "evaluation.json", {"unet_sha256": weights, "generation": {"n": [300, 9]}})
        started = []
        run_train(Train(data_dir="scenes", output_dir=str(tmp_path), num_images=num_images), started.append)
        assert ("evaluate" in [words[0] for words in started]) == expected
        shown = capsys.readouterr().out
        assert (f"evaluated before: {pipeline / 'evaluation.html'}" in shown) != expected
        assert f"samples, a row for each class: {pipeline / 'grid.png'}" in shown


def test_the_scripts_are_commands_and_the_version_and_the_environment_are_printed(vae_flags, tmp_path):
    tool("train-vae", *vae_flags, "--max-train-steps", 1, "--no-perceptual", "--output-dir", tmp_path)
    assert (tmp_path / "config.json").is_file()
    assert tool_here("--version").stdout == f"corel-diffusers {__version__}\n"
    printed = tool_here("env").stdout
    assert f"torch: {metadata.version('torch')}\n" in printed
    assert os.environ["HF_HOME"] in printed
    refused = tool_here("train", check=False)
    assert refused.returncode == 2
    assert refused.stderr == "error: train needs photos: give --data-dir, a folder of photos, or --dataset-name\n"


def test_a_misspelt_flag_names_the_nearest_one():
    done = launch(sys.executable, ROOT / "train_vae.py", "--image-sise", 64, check=False)
    assert done.returncode == 2
    assert "--image-size" in done.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train-vae", "--batch-size", "x"], "error: --batch-size 'x': expected --batch-size INT (see "),
        (
            ["train-vae", "--reslution", "64"],
            "error: unrecognized options: --reslution, 64: perhaps you meant --resolution (",
        ),
        (["train-vae", "--epoch", "3"], "error: unrecognized options: --epoch, 3: perhaps you meant --epochs (see "),
        (["generate", "--sampler", ""], "error: invalid choice '' for argument '--sampler'. Expected one of ("),
        (
            ["train", "--data-dir", "scenes", "--train_batch_size", "8"],
            "error: unrecognized options: --batch-size, 8 (see corel-diffusers train --help; "
            "train-vae and train-unet have more flags)",
        ),
        (["train", "photos"], "error: unrecognized options: photos: give the flag before its value (see "),
        (["train-unet", "--ema", "True"], "error: unrecognized options: True: this flag takes no value (see "),
        (["paint"], "error: there is no command paint: give one of train, prepare,"),
    ],
)
def test_a_wrong_command_line_ends_in_one_line(words, expected):
    refused = tool_here(*words, check=False)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith(expected)


def test_a_wrong_command_line_ends_in_one_line_on_a_screen_that_cannot_show_boxes():
    """tyro draws boxes around its messages, with characters that are not in ASCII."""
    refused = tool("train-vae", "--batch-size", "x", env={"PYTHONIOENCODING": "ascii"}, check=False)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: --batch-size 'x': expected --batch-size INT (see ")
