"""Faults: wrong values of flags, full disks, damaged files and folders from strangers. Each gives one line."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_photos, run_here, tool_here
from safetensors.numpy import load_file, save_file

from corel_diffusers.config.checks import require_usable
from corel_diffusers.config.commands import Evaluate, Generate, Prepare, Push
from corel_diffusers.config.unet import UNetArguments
from corel_diffusers.config.vae import VAEArguments
from corel_diffusers.data import cache
from corel_diffusers.data.cache import cached_array, is_whole, shard_path
from corel_diffusers.data.latents import load_vae
from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.prepare import prepare
from corel_diffusers.files import (
    UserError,
    explain_full_disk,
    one_line_errors,
    read_json,
    read_metrics,
    require_writable,
    write_text,
)
from corel_diffusers.hub.upload import push
from corel_diffusers.models.reading import read_vae
from corel_diffusers.models.unet import build_unet
from corel_diffusers.models.vae import build_vae
from corel_diffusers.sampling.pipelines import load_pipeline, pick_device
from corel_diffusers.training import checkpoints
from corel_diffusers.training.initial_weights import load_initial_unet, load_initial_vae
from corel_diffusers.trust import require_own_code

KINDS = (VAEArguments, UNetArguments, Generate, Evaluate)


def numbers_of(kind: type) -> list[str]:
    """Return the names of the flags that are numbers."""
    return [field.name for field in fields(kind) if "float" in str(field.type)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in numbers_of(kind)])
def test_numbers_that_are_not_finite_are_refused_by_name(kind, name, value):
    flags = kind.__new__(kind)
    for field in fields(kind):
        object.__setattr__(flags, field.name, None)
    is_pair = "tuple" in str(kind.__dataclass_fields__[name].type)
    object.__setattr__(flags, name, (value, 1.0) if is_pair else value)
    option = "--" + name.replace("_", "-")
    with pytest.raises(UserError, match=rf"^{option} -?(nan|inf): give a finite number$"):
        require_usable(flags)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (Prepare(data_dir=""), "--data-dir '': the value is empty"),
        (VAEArguments(output_dir=" "), "--output-dir ' ': the value is empty"),
        (VAEArguments(dataset_name=""), "--dataset-name '': the value is empty"),
        (VAEArguments(classes=("a", "")), "--classes '': the value is empty"),
        (VAEArguments(output_dir="caf\udce9"), r"--output-dir 'caf\\udce9': give text in UTF-8"),
        (Generate(class_=("a\nb",)), r"--class 'a\\nb': give text in UTF-8, without control characters"),
        (Push(repo_id="user/\x1b[31mred"), "--repo-id .*: give text in UTF-8, without control characters"),
        (VAEArguments(batch_size=10**18), "--batch-size 1000000000000000000: give at most 1,000,000"),
        (Generate(num_images=10**9), "--num-images 1000000000: give at most 1,000,000"),
        (Generate(seed=2**64), "--seed 18446744073709551616: give at most 9,223,372,036,854,775,807"),
    ],
)
def test_values_that_no_command_can_use_are_refused_by_name(flags, expected):
    with pytest.raises(UserError, match=expected):
        require_usable(flags)


@pytest.mark.parametrize("size", ["", "4", "0", "-1", "1x", "16x", "9" * 5000, "99999", "²"])
def test_image_sizes_have_a_range(size, tmp_path):
    with pytest.raises(UserError, match="--image-size"):
        VAEArguments(data_dir=str(tmp_path), image_size=size).checked()


@pytest.mark.parametrize("name", ["meta", "xpu", "nothing"])
def test_devices_that_cannot_draw_are_refused(name):
    with pytest.raises(UserError, match=f"--device {name}"):
        pick_device(name)


def test_an_output_that_is_a_folder_or_a_device_is_refused_before_anything_is_drawn(trained_unet, tmp_path):
    (tmp_path / "grid.png").mkdir()
    with pytest.raises(UserError, match="this is a folder: give the name of a file"):
        Generate(pipeline=str(trained_unet), output=str(tmp_path / "grid.png")).checked()
    with pytest.raises(UserError, match="/dev/null is not a folder"):
        require_writable(Path("/dev/null"), "--output-dir")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_run_that_does_not_fit_on_the_disk_is_refused_before_its_first_step(
    optimizer, vae_flags, trained_vae, tmp_path, monkeypatch
):
    """The reference are the files that a run leaves. `trained_vae` has filled the caches before."""
    flags = [*vae_flags, "--max-train-steps", 1, "--optimizer", optimizer, "--keep-checkpoints", 2]
    asked, original = {}, checkpoints.require_space

    def require_space(folder: Path, name: str, num_bytes: int) -> None:
        asked[name] = num_bytes
        original(folder, name, num_bytes)

    monkeypatch.setattr(checkpoints, "require_space", require_space)
    run_here("train_vae", [*flags, "--output-dir", tmp_path / "run"])
    files = list((tmp_path / "run" / "checkpoints").rglob("*.safetensors"))
    weights = next(file.stat().st_size for file in files if file.name == "model.safetensors")
    expected = weights + 3 * sum(file.stat().st_size for file in files)
    assert asked["--output-dir"] == pytest.approx(expected, rel=0.1), "the headers of the files are not counted"

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(UserError, match="--output-dir: .* needs about . MB more, and its disk has 0 MB left: make"):
        run_here("train_vae", [*flags, "--output-dir", tmp_path / "new" / "run"])
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="HF_HOME: .* needs about"):
        cached_array("new", (64, 1000), np.uint8, None, "numbers")


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT", "EROFS"])
def test_a_full_disk_is_one_line_and_the_older_file_stays(number, tmp_path, monkeypatch):
    write_text(tmp_path / "file", "old")
    error = OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

    def full(path: Path, content: bytes) -> int:
        raise error

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="cannot be written to .*: make room there, then give the same command again"):
        write_text(tmp_path / "file", "new")
    monkeypatch.undo()
    assert (tmp_path / "file").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1, "no partial file is left"
    with pytest.raises(UserError, match="^HF_HOME: "), explain_full_disk(tmp_path, "HF_HOME"):
        raise RuntimeError(f"a library says: {os.strerror(errno.ENOSPC)} (os error 28)")
    with pytest.raises(ValueError, match="another error"), explain_full_disk(tmp_path):
        raise ValueError("another error")


def test_a_full_disk_is_one_line_wherever_a_program_meets_it(capsys):
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "notes.txt")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: notes.txt cannot be written (No space left on device): make room there\n"
    with pytest.raises(FileNotFoundError), one_line_errors():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "notes.txt")


LOST_PROCESS = """
import atexit
import os
import sys

import torch.distributed as dist

from corel_diffusers.training.start import run_script

atexit.register(print, "the interpreter ends as usual")


def main(flags):
    dist.init_process_group("gloo")
    dist.barrier()
    if os.environ["RANK"] == "1":
        sys.exit(138)
    dist.barrier()


run_script(main, None)
"""


def test_a_process_that_has_lost_the_other_one_says_so_in_a_line(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    options = {"cwd": tmp_path, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    both = [
        subprocess.Popen([sys.executable, "-c", LOST_PROCESS], env=env | {"RANK": rank}, **options) for rank in "01"
    ]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [2, 138]
    assert outputs[0][1].strip().splitlines()[-1].startswith("error: another process of this run has ended")
    assert [output for output, _ in outputs] == ["", ""], "they end without freeing what torch's threads still use"


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", "{", '{"a": NaN'])
def test_json_of_any_content_is_one_line(content, tmp_path):
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(UserError, match="is not valid JSON"):
        read_json(tmp_path / "file.json")


def test_a_damaged_line_of_the_metrics_is_told_and_the_others_are_kept(tmp_path, capsys):
    lines = [json.dumps({"step": step, "epoch": step}) for step in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(["x" + lines[0], *lines[1:]]) + "\n" + '{"step": 5, "ep')
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [2, 3, 4]
    printed = capsys.readouterr().out
    assert "metrics.jsonl line 1 is damaged: it is left out" in printed
    assert "line 5" not in printed, "a kill can cut off the last line"


@pytest.mark.parametrize("fault", ["flipped", "truncated", "empty", "header"])
def test_a_damaged_shard_of_a_cache_is_made_again(fault, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CACHE_DIR", tmp_path)
    values = np.arange(24, dtype=np.float32).reshape(6, 4)
    made = []

    def make(photos: slice) -> np.ndarray:
        made.append(photos)
        return values[photos]

    array = cached_array("key", values.shape, np.float32, make, "testing")
    assert np.array_equal(array[:], values)
    shard = shard_path(tmp_path / "key", 0)
    content = bytearray(shard.read_bytes())
    if fault in ("flipped", "header"):
        content[-3 if fault == "flipped" else 3] ^= 0x40
    else:
        content = content[: {"truncated": len(content) - 4, "empty": 0}[fault]]
    shard.write_bytes(content)
    assert not is_whole(shard)
    assert np.array_equal(cached_array("key", values.shape, np.float32, make, "testing")[:], values)
    assert len(made) == 2
    save_file(load_file(shard), shard)  # of an earlier version: without a checksum
    assert is_whole(shard)


def test_damaged_models_are_no_initial_weights(trained_unet, tmp_path):
    vae = read_vae(trained_unet, "--init-from")
    assert torch.equal(vae.decoder.conv_in.weight, load_vae(trained_unet / "vae").decoder.conv_in.weight)
    for part in ("vae", "unet"):
        folder = shutil.copytree(trained_unet, tmp_path / part)
        weights = folder / part / "diffusion_pytorch_model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-3] ^= 1
        weights.write_bytes(content)
        with pytest.raises(
            UserError, match=f"--init-from .*: {part}/diffusion_pytorch_model.safetensors .*copy it aga"
        ):
            load_initial_vae(vae, folder)
        with pytest.raises(
            UserError, match=f"--init-from .*: {part}/diffusion_pytorch_model.safetensors .*copy it aga"
        ):
            load_initial_unet(None, folder, [], vae)


@pytest.mark.parametrize("name", ["../outside/a.png", "/etc/a.png", "a/../../b.png", "C:\\photos\\a.png"])
def test_metadata_that_names_files_outside_its_folder_is_refused(name, raw_photos, tmp_path):
    shutil.copytree(raw_photos, tmp_path / "photos")
    rows = [{"file_name": file.name} for file in (tmp_path / "photos").glob("*.png")] + [{"file_name": name}]
    (tmp_path / "photos" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="lies outside the folder of photos: copy it into the folder"):
        load_photos(tmp_path / "photos")


def test_prepare_writes_nowhere_else(tmp_path):
    photos = make_photos(tmp_path / "photos")
    (tmp_path / "out" / "corel").mkdir(parents=True)
    line = {"source": "0001_0001.png", "size": 1, "changed": 1, "trim": True, "file_name": "../../../escaped.png",
            "borders": [0, 0, 0, 0], "phashes": ["0", "0"], "reason": ""}  # fmt: skip
    (tmp_path / "out" / "corel" / "prepared.jsonl").write_text(json.dumps(line) + "\n")
    prepare(photos, tmp_path / "out", None, "auto", trim_borders=True, strict=False)
    assert not list(tmp_path.rglob("escaped*"))
    assert (tmp_path / "out" / "corel" / "corel_all" / "0001_0001.png").is_file()


def test_code_of_a_strangers_folder_runs_only_with_consent(trained_unet, tmp_path):
    folder, proof = tmp_path / "model", tmp_path / "proof"
    shutil.copytree(trained_unet, folder)
    require_own_code(folder, "--pipeline")
    with (folder / "pipeline.py").open("a") as file:
        file.write(f"\nopen({str(proof)!r}, 'w')\n")
    flags = ["generate", "--pipeline", folder, "--num-images", 1, "--steps", 1, "--output", tmp_path / "g.png"]
    done = tool_here(*flags, check=False)
    assert done.returncode == 2
    assert "(pipeline.py): read it, then give --trust-remote-code" in done.stderr
    assert not proof.exists()
    tool_here(*flags, "--trust-remote-code")
    assert proof.exists()
    shutil.copy(trained_unet / "pipeline.py", folder)
    (folder / "unet" / "model.py").write_text("")
    with pytest.raises(UserError, match=r"\(unet/model.py\)"):
        require_own_code(folder, "--pipeline")


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("unet", "sample_size", 10**9),
        ("unet", "in_channels", 10**9),
        ("unet", "norm_num_groups", 0),
        ("unet", "block_out_channels", "text"),
        ("unet", "layers_per_block", 10**9),
        ("vae", "layers_per_block", 10**9),
        ("vae", "latents_mean", [0.0]),
        ("vae", "latents_mean", ["a"] * 4),
        ("vae", "latents_std", [0.0] * 4),
        ("vae", "latents_std", [float("nan")] * 4),
        ("vae", "sample_size", "text"),
        ("vae", "scaling_factor", 0),
    ],
)
def test_values_of_a_hostile_config_are_one_line(file, name, value, trained_unet, tmp_path):
    shutil.copytree(trained_unet, tmp_path / "model")
    config = tmp_path / "model" / file / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {name: value}))
    with pytest.raises(UserError, match="--pipeline"):
        load_pipeline(tmp_path / "model", pick_device("cpu"))


def test_layers_without_end_are_refused_before_they_are_built(trained_unet, tmp_path, configs):
    shutil.copytree(trained_unet, tmp_path / "model")
    for config in (tmp_path / "model" / "vae" / "config.json", tmp_path / "unet.json"):
        values = json.loads((config if config.exists() else configs / "unet.json").read_text())
        config.write_text(json.dumps(values | {"layers_per_block": 10**9}))
    new_vae = build_vae("tiny", (32, 32))
    with pytest.raises(UserError, match=r"--vae-checkpoint .*layers_per_block must be a number from 1 to 64"):
        load_vae(tmp_path / "model" / "vae")
    for location in (tmp_path / "model", tmp_path / "model" / "vae"):
        with pytest.raises(UserError, match=r"--init-from .*layers_per_block must be"):
            load_initial_vae(new_vae, location)
    with pytest.raises(UserError, match=r"--config .*layers_per_block must be"):
        build_unet(str(tmp_path / "unet.json"), (32, 32), new_vae, None)


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**9),
        ("scheduler/scheduler_config.json", "num_train_timesteps", "text"),
        ("model_index.json", "image_sizes", {"x": 1}),
        ("model_index.json", "image_sizes", {"999999x999999": 1}),
    ],
)
def test_timesteps_and_image_sizes_of_a_pipeline_have_a_range(file, name, value, trained_unet, tmp_path):
    shutil.copytree(trained_unet, tmp_path / "model")
    file = tmp_path / "model" / file
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(UserError, match=f"--pipeline .*({name}|image size)"):
        load_pipeline(tmp_path / "model", pick_device("cpu"))


def test_class_names_that_are_no_text_are_one_line(trained_unet, tmp_path):
    shutil.copytree(trained_unet, tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(json.dumps(read_json(index) | {"class_names": {"0": {"x": 1}}}))
    with pytest.raises(UserError, match="--pipeline .*class_names must give each label a name"):
        load_pipeline(tmp_path / "model", pick_device("cpu"))


@pytest.mark.parametrize("damage", ["pipeline.py", "model_index.json", "{}", "[]"])
def test_a_damaged_pipeline_folder_is_one_line(damage, trained_unet, tmp_path):
    shutil.copytree(trained_unet, tmp_path / "model")
    if damage in ("{}", "[]"):
        (tmp_path / "model" / "model_index.json").write_text(damage)
    else:
        (tmp_path / "model" / damage).unlink()
    with pytest.raises(UserError, match="--pipeline"):
        load_pipeline(tmp_path / "model", pick_device("cpu"))


def test_a_push_lists_and_sends_only_the_pipeline(trained_unet, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(trained_unet, folder)
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "vae" / "notes.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "vae" / ".env").write_text("KEY=1")
    push(folder, "user/model", dry_run=True)
    listed = capsys.readouterr().out
    assert "vae/config.json" in listed
    assert "notes.txt" not in listed
    assert ".env" not in listed
    monkeypatch.setattr("corel_diffusers.hub.upload.get_token", lambda: None)
    card = (folder / "README.md").read_bytes()
    with pytest.raises(UserError, match="no token"):
        push(folder, "user/other")
    assert (folder / "README.md").read_bytes() == card, "a refused push changes nothing"
    assert str(trained_unet.parent) not in (folder / "vae" / "config.json").read_text()


def test_a_card_of_the_user_in_another_encoding_is_kept(trained_unet, tmp_path):
    from corel_diffusers.hub.cards import write_card

    shutil.copytree(trained_unet, tmp_path / "model")
    (tmp_path / "model" / "README.md").write_bytes("# Meine Bäume\n".encode("latin-1"))
    write_card(tmp_path / "model")
    assert (tmp_path / "model" / "README.md").read_bytes() == "# Meine Bäume\n".encode("latin-1")


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_changed_weights_of_a_pipeline_are_refused_and_a_changed_config_is_named(part, trained_unet, tmp_path, capsys):
    folder = tmp_path / "pipeline"
    shutil.copytree(trained_unet, folder, ignore=shutil.ignore_patterns("checkpoints"))
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("0.02", "0.03"))
    load_pipeline(folder, torch.device("cpu"))
    assert f"notice: --pipeline {folder}: scheduler/scheduler_config.json has changed" in capsys.readouterr().out
    weights = folder / part / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=f"{part}/diffusion_pytorch_model.safetensors has changed since it was saved"):
        load_pipeline(folder, torch.device("cpu"))
    weights.unlink()
    with pytest.raises(UserError, match=f"{part}/diffusion_pytorch_model.safetensors is missing: copy it again"):
        load_pipeline(folder, torch.device("cpu"))


def test_a_pipeline_that_a_user_saves_again_is_not_damaged(trained_unet, tmp_path, capsys):
    folder = tmp_path / "pipeline"
    shutil.copytree(trained_unet, folder, ignore=shutil.ignore_patterns("checkpoints"))
    pipe = load_pipeline(folder, torch.device("cpu"))
    with torch.no_grad():
        pipe.unet.conv_in.weight.add_(0.1)
    pipe.save_pretrained(folder)
    load_pipeline(folder, torch.device("cpu"))
    assert "has changed" not in capsys.readouterr().out
