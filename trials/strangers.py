"""Folders of strangers: pipelines, data sets and configs that try to run code, or to read or write outside.

Right: nothing runs, nothing outside is read or written, and what is refused is refused in one line.
"""

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

from common import Base, Result, Trial, fresh_folder, rng_of, run

SECRET = "the content of a private file"
WEIGHTS = "diffusion_pytorch_model.safetensors"


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return exec, (f"open({str(self.marker)!r}, 'w')",)


def pipeline_of(base: Base, folder: Path) -> Path:
    shutil.copytree(base.unet, folder / "pipe", ignore=shutil.ignore_patterns("checkpoints"))
    return folder / "pipe"


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


CODE = "open({marker!r}, 'w')\n"


def hostile_code(pipe: Path, marker: Path, place: str) -> None:
    """Put code into the pipeline's folder that writes the marker when it is imported."""
    code = CODE.format(marker=str(marker))
    if place == "pipeline.py":
        file = pipe / "pipeline.py"
        file.write_text(code + file.read_text())
    elif place == "at the end of pipeline.py":
        file = pipe / "pipeline.py"
        file.write_text(file.read_text() + code)
    elif place == "another module":
        (pipe / "other.py").write_text(code + (pipe / "pipeline.py").read_text())
        edit(pipe / "model_index.json", _class_name=["other", "CorelPipeline"])
    elif place == "a component":
        (pipe / "unet" / "mine.py").write_text(code + "from diffusers import UNet2DModel as Mine\n")
        edit(pipe / "model_index.json", unet=["mine", "Mine"])
    elif place == "a module of diffusers' name":
        (pipe / "diffusers.py").write_text(code)
    elif place == "a scheduler":
        (pipe / "scheduler" / "own.py").write_text(code + "from diffusers import DDPMScheduler as Own\n")
        edit(pipe / "model_index.json", scheduler=["own", "Own"])


PLACES = (
    "pipeline.py",
    "at the end of pipeline.py",
    "another module",
    "a component",
    "a module of diffusers' name",
    "a scheduler",
)


def uses(base: Base, pipe: Path, folder: Path) -> dict[str, list[object]]:
    return {
        "generate": ["generate", "--pipeline", pipe, "--num-images", 1, "--steps", 1, "--output", folder / "g.png"],
        "evaluate": [
            "evaluate",
            "--pipeline",
            pipe,
            "--data-dir",
            base.photos,
            "--num-images",
            4,
            "--steps",
            1,
            "--against",
            "all",
            "--output-dir",
            folder / "e",
        ],
        "push": ["push", "--pipeline", pipe, "--repo-id", "user/name", "--dry-run"],
        "train_unet --init-from": base.train_unet(folder / "run", "--init-from", pipe),
        "train_unet --vae-checkpoint": base.train_unet(folder / "run", vae=pipe / "vae"),
    }


def code(base: Base, place: str, use: str, index: int) -> str:
    folder = fresh_folder(f"code {index}")
    marker, pipe = folder / "RAN", pipeline_of(base, folder)
    hostile_code(pipe, marker, place)
    done = run(*uses(base, pipe, folder)[use], folder=folder)
    if marker.exists():
        return "the code ran"
    return "" if done.code == 0 else done.refused()


def pickles(base: Base, part: str, name: str, use: str, index: int) -> str:
    folder = fresh_folder(f"pickle {index}")
    marker, pipe = folder / "RAN", pipeline_of(base, folder)
    (pipe / part / WEIGHTS).unlink()
    (pipe / part / name).write_bytes(pickle.dumps(Evil(marker)))
    (pipe / "manifest.json").unlink()
    done = run(*uses(base, pipe, folder)[use], folder=folder)
    if marker.exists():
        return "the pickle ran"
    if use == "push":
        return "the pickle would be pushed" if name in done.output else ""
    return done.refused() if not (use.endswith("vae-checkpoint") and part == "unet") else ""


def links(base: Base, place: str, kind: str, index: int) -> str:
    """A link in a pipeline's folder that leads to a private file must not be pushed."""
    folder = fresh_folder(f"link {index}")
    secret = folder / "secret.txt"
    secret.write_text(SECRET)
    pipe = pipeline_of(base, folder)
    file = pipe / place
    file.unlink(missing_ok=True)
    if kind == "link":
        file.symlink_to(secret)
    elif kind == "relative link":
        file.symlink_to(os.path.relpath(secret, file.parent))
    elif kind == "hidden file":
        file.with_name("." + file.name).write_text(SECRET)
    else:  # a folder that is a link
        shutil.rmtree(file.parent)
        outside = folder / "outside"
        outside.mkdir()
        (outside / file.name).write_text(SECRET)
        file.parent.symlink_to(outside)
    from corel_diffusers.files import UserError
    from corel_diffusers.hub import upload

    sent: dict[str, bytes] = {}

    class Api:
        def upload_folder(self, folder_path: Path, allow_patterns: list[str], **options: object) -> object:
            from huggingface_hub.utils import filter_repo_objects

            names = [f.relative_to(folder_path).as_posix() for f in Path(folder_path).rglob("*") if f.is_file()]
            for name in filter_repo_objects(names, allow_patterns=allow_patterns):
                sent[name] = (Path(folder_path) / name).read_bytes()
            return type("Commit", (), {"commit_url": "x"})()

        def create_repo(self, *arguments: object, **options: object) -> None:
            pass

    listed, original = io.StringIO(), (upload.HfApi, upload.require_token)
    upload.HfApi, upload.require_token = Api, lambda: None
    try:
        with redirect_stdout(listed):
            upload.push(pipe, "user/name")
    except UserError:
        pass
    finally:
        upload.HfApi, upload.require_token = original
    if any(SECRET.encode() in content for content in sent.values()):
        return "a file from outside would be uploaded"
    unlisted = [name for name in sent if name not in listed.getvalue()]
    return f"not listed: {unlisted}" if unlisted else ""


def configs(base: Base, file: str, values: dict, use: str, index: int) -> str:
    """A config with values that ask for much memory, or that are of another type."""
    folder = fresh_folder(f"config {index}")
    pipe = pipeline_of(base, folder)
    edit(pipe / file, **values)
    done = run(*uses(base, pipe, folder)[use], folder=folder, env={})
    if done.code < 0:
        return "it was killed: too much memory or time"
    return "" if done.code == 0 and not done.has_traceback else done.refused()


def paths(base: Base, name: str, table: str, index: int) -> str:
    """A table that names a file outside of its folder must not be read."""
    folder = fresh_folder(f"paths {index}")
    photos = shutil.copytree(base.photos, folder / "photos")
    shutil.copy(photos / "0001_0001.png", folder / "outside.png")
    name = name.format(folder=folder)
    rows = [{"file_name": name, "text": "x"}, {"file_name": "0001_0002.png", "text": "y"}]
    if table == "metadata.jsonl":
        (photos / table).write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif table == "metadata.csv":
        (photos / table).write_text(
            "file_name,text\n" + "".join(f'"{row["file_name"]}",{row["text"]}\n' for row in rows)
        )
    elif table == "captions.json":
        (photos / table).write_text(json.dumps({name: "x"}))
    else:
        (photos / table).write_text(json.dumps({"train": [name], "validation": ["0001_0002.png"]}))
    before = (folder / "outside.png").stat().st_mtime_ns
    for words in (
        ["prepare", "--data-dir", photos, "--output-dir", folder / "prepared", "--figs-dir", folder / "figs"],
        base.train_vae(folder / "run", "--max-train-steps", 1, photos=photos),
    ):
        done = run(*words, folder=folder)
        if done.has_traceback or done.code not in (0, 2):
            return f"exit code {done.code}: {done.last_line}"
    lists = [*folder.glob("run/training_photos.txt"), *folder.glob("prepared/corel/corel_all/metadata.jsonl")]
    if any("outside" in file.read_text() for file in lists):
        return "a photo outside of the folder is used"
    return "" if (folder / "outside.png").stat().st_mtime_ns == before else "a file outside was written"


def names(base: Base, name: str, index: int) -> str:
    """Names with escape sequences or HTML reach neither the screen nor the pages as they are."""
    folder = fresh_folder(f"names {index}")
    pipe = pipeline_of(base, folder)
    edit(pipe / "model_index.json", class_names={"0": name, "1": "b", "2": "c"})
    results: list[Result] = [
        run("generate", "--pipeline", pipe, "--num-images", 1, "--steps", 1, "--class", "nothing", folder=folder),
        run(
            "generate", "--pipeline", pipe, "--num-images", 3, "--steps", 1, "--output", folder / "g.png", folder=folder
        ),
    ]
    for done in results:
        if done.has_traceback or done.code not in (0, 2):
            return f"exit code {done.code}: {done.last_line}"
        if "\x1b" in done.output:
            return "an escape sequence reached the screen"
    from corel_diffusers.hub.cards import write_card

    (pipe / "README.md").unlink()
    write_card(pipe)
    lines = (pipe / "README.md").read_text().split("## Use")[1].splitlines()
    in_text = [line for line in lines if "class_labels=" not in line]  # the example is code, in which names are quoted
    return "HTML reached the card" if any("<script" in line for line in in_text) else ""


def numbered(trials: list[tuple[str, Callable[[int], str]]]) -> list[Trial]:
    return [Trial(f"{title}, {index}", partial(trial, index)) for index, (title, trial) in enumerate(trials)]


def trials(base: Base, seed: int, count: int = 220) -> list[Trial]:
    found: list[tuple[str, Callable[[int], str]]] = []
    commands = ("generate", "evaluate", "push", "train_unet --init-from", "train_unet --vae-checkpoint")

    def add(title: str, function: Callable[..., str], *arguments: object) -> None:
        found.append((title, lambda index: function(base, *arguments, index)))

    for place in PLACES:
        for use in commands:
            add(f"code in {place}, {use}", code, place, use)
    for part in ("unet", "vae"):
        for name in (
            "diffusion_pytorch_model.bin",
            "diffusion_pytorch_model.pt",
            "pytorch_model.bin",
            "model.ckpt",
            "diffusion_pytorch_model.fp16.bin",
        ):
            for use in commands:
                add(f"pickle {part}/{name}, {use}", pickles, part, name, use)
    for place in (
        "vae/config.json",
        f"unet/{WEIGHTS}",
        "unet/notes.txt",
        "grid.png",
        "scheduler/scheduler_config.json",
        "vae/id_rsa",
    ):
        for kind in ("link", "relative link", "hidden file", "a folder that is a link"):
            if not (kind.startswith("a folder") and "/" not in place):
                add(f"{kind} at {place}", links, place, kind)
    for file, key, values in (
        ("unet/config.json", "sample_size", (10**6, -1, "x", [1, 2, 3])),
        ("unet/config.json", "block_out_channels", ([10**7, 10**7], [], "x")),
        ("unet/config.json", "layers_per_block", (10**9, 0, "x")),
        ("vae/config.json", "layers_per_block", (10**9, 0, "x")),
        ("unet/config.json", "num_class_embeds", (10**9, -1, "x")),
        ("vae/config.json", "block_out_channels", ([10**7] * 3, [], "x")),
        ("vae/config.json", "latent_channels", (10**8, 0, "x")),
        ("vae/config.json", "latents_std", ([0.0] * 4, ["a"] * 4, [1.0])),
        ("scheduler/scheduler_config.json", "num_train_timesteps", (10**9, -1, "x")),
        ("scheduler/scheduler_config.json", "prediction_type", ("x", None, 3)),
        ("model_index.json", "class_names", ({"a": "b"}, [1], "x", {"0": {"x": 1}})),
        ("model_index.json", "image_sizes", ({"x": 1}, {"0x0": 1}, {"999999x999999": 1})),
        ("model_index.json", "_class_name", ("os.system", ["../../x", "X"], 3)),
    ):
        for value in values:
            for use in ("generate", "train_unet --init-from"):
                add(f"{file} {key} = {value!r}, {use}", configs, file, {key: value}, use)
    for name in (
        "../outside.png",
        "{folder}/outside.png",
        "x/../../outside.png",
        "/etc/passwd",
        "..\\outside.png",
        "file:///etc/passwd",
    ):
        for table in ("metadata.jsonl", "metadata.csv", "captions.json", "split.json"):
            add(f"{table} names {name}", paths, name, table)
    for name in (
        "a\x1b[2Jb",
        "<script>alert(1)</script>",
        "```\n<script>",
        "a\nb",
        "\u202eabc",
        "x" * 10_000,
        "a`b",
        "{{ 7 * 7 }}",
        "%s%n",
    ):
        add(f"a class named {name[:20]!a}", names, name)
    rng_of(seed, "strangers").shuffle(found)
    return numbered(found[:count])
