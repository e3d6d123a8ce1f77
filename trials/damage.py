"""One byte flipped, truncated, emptied or missing: each kind of file of a run, of `prepare`, a cache, a pipeline.

Right: the damage is made good (the result is that of undamaged files) or named. There is no traceback.
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
from common import Base, Result, Trial, fresh_folder, not_finite, rng_of, run, same_run
from PIL import Image

DAMAGES = ("flipped", "truncated", "empty", "missing")


def damage(file: Path, kind: str, rng: Random) -> None:
    content = bytearray(file.read_bytes())
    if kind == "missing":
        file.unlink()
        return
    if kind == "flipped":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "truncated":
        del content[rng.randrange(len(content)) :]
    else:
        content.clear()
    file.write_bytes(content)


def judged(done: Result, equals_reference: Callable[[], bool]) -> str:
    """Return what is wrong. A program that ends well has the result of undamaged files, or has named what it found."""
    if done.code == 2:
        return done.refused()
    if done.code or done.has_traceback:
        return f"exit code {done.code}: {done.last_line}"
    named = any(word in done.output for word in ("damaged", "notice", "left out", "changed", "ignored", "missing"))
    return "" if named or equals_reference() else "the damaged file was used in silence"


def of_checkpoint(base: Base, script: str, file: str, kind: str, rng: Random, folder: Path) -> str:
    source = {"train_vae": base.vae, "train_unet": base.unet}[script]
    shutil.copytree(source, folder / "run")
    newest = sorted((folder / "run" / "checkpoints").iterdir())[-1]
    damage(newest / file, kind, rng)
    # the run is made to end earlier and to continue, as after an interruption
    words = getattr(base, script)(folder / "run", "--epochs", 4, "--resume", "latest")
    return judged(run(*words, folder=folder), lambda: False) or not_finite(folder / "run")


def of_run(base: Base, script: str, file: str, kind: str, rng: Random, folder: Path) -> str:
    source = {"train_vae": base.vae, "train_unet": base.unet}[script]
    shutil.copytree(source, folder / "run")
    damage(folder / "run" / file, kind, rng)
    words = getattr(base, script)(folder / "run", "--resume", "latest")
    return judged(run(*words, folder=folder), lambda: not same_run(source, folder / "run"))


def of_cache(base: Base, script: str, number: int, kind: str, rng: Random, folder: Path) -> str:
    source = {"train_vae": base.vae, "train_unet": base.unet}[script]
    words, cache = getattr(base, script)(folder / "run"), folder / "cache"
    done = run(*words, folder=folder, cache=cache)
    if done.code:
        return done.last_line
    shutil.rmtree(folder / "run")
    files = sorted(file for file in cache.rglob("*") if file.is_file())
    damage(files[number % len(files)], kind, rng)
    return judged(run(*words, folder=folder, cache=cache), lambda: not same_run(source, folder / "run"))


def of_prepared(base: Base, file: str, kind: str, rng: Random, folder: Path) -> str:
    done = run("prepare", "--data-dir", base.photos, "--output-dir", "prepared", "--figs-dir", "figs", folder=folder)
    if done.code:
        return done.last_line
    prepared = folder / "prepared" / "corel" / "corel_all"
    reference = run(*base.train_vae(folder / "reference", photos=prepared), folder=folder)
    target = sorted(prepared.glob(file))[0] if file != "source.json" else prepared.parent / file
    damage(target, kind, rng)
    done = run(*base.train_vae(folder / "run", photos=prepared), folder=folder)
    # captions are not used in training
    return (reference.code and "no reference") or judged(
        done, lambda: not same_run(folder / "reference", folder / "run")
    )


def of_pipeline(base: Base, file: str, kind: str, rng: Random, folder: Path) -> str:
    shutil.copytree(base.unet, folder / "pipe", ignore=shutil.ignore_patterns("checkpoints"))
    words = ["generate", "--num-images", 2, "--seed", 1, "--steps", 2, "--mixed-precision", "no", "--output"]
    if run(*words, "reference.png", "--pipeline", base.unet, folder=folder).code:
        return "no reference"
    damage(folder / "pipe" / file, kind, rng)
    done = run(*words, "grid.png", "--pipeline", folder / "pipe", folder=folder)
    grids = [folder / name for name in ("reference.png", "grid.png")]
    return judged(done, lambda: np.array_equal(*(np.asarray(Image.open(grid)) for grid in grids)))


def of_vae(base: Base, file: str, kind: str, rng: Random, folder: Path) -> str:
    shutil.copytree(base.vae, folder / "vae", ignore=shutil.ignore_patterns("checkpoints"))
    damage(folder / "vae" / file, kind, rng)
    done = run(*base.train_unet(folder / "run", vae=folder / "vae"), folder=folder)
    return judged(done, lambda: not same_run(base.unet, folder / "run"))


def trials(base: Base, seed: int, count: int = 320) -> list[Trial]:
    kinds: list[tuple[str, Callable[..., str]]] = []
    for script, source in (("train_vae", base.vae), ("train_unet", base.unet)):
        newest = sorted((source / "checkpoints").iterdir())[-1]
        kinds += [
            (f"checkpoint of {script}, {file.name}", partial(of_checkpoint, base, script, file.name))
            for file in sorted(newest.iterdir())
        ]
        kinds += [
            (f"run of {script}, {name}", partial(of_run, base, script, name))
            for name in ("run.json", "metrics.jsonl", "training_photos.txt", "manifest.json")
        ]
        kinds += [(f"cache of {script}, file {n}", partial(of_cache, base, script, n)) for n in range(5)]
    prepared = ("metadata.jsonl", "captions.json", "split.json", "classes.txt", "*.png", "source.json")
    kinds += [(f"prepared, {name}", partial(of_prepared, base, name)) for name in prepared]
    weights = "diffusion_pytorch_model.safetensors"
    parts = (
        "model_index.json",
        "pipeline.py",
        "unet/config.json",
        f"unet/{weights}",
        "vae/config.json",
        f"vae/{weights}",
        "scheduler/scheduler_config.json",
        "manifest.json",
    )
    kinds += [(f"pipeline, {name}", partial(of_pipeline, base, name)) for name in parts]
    kinds += [(f"VAE, {name}", partial(of_vae, base, name)) for name in ("config.json", weights, "manifest.json")]
    found = []
    for number in range(count):
        name, trial = kinds[number // len(DAMAGES) % len(kinds)]
        kind = DAMAGES[number % len(DAMAGES)]
        title = f"{name}, {kind}, {number}"
        found.append(Trial(title, partial(with_folder, trial, kind, seed, title)))
    return found


def with_folder(trial: Callable[..., str], kind: str, seed: int, title: str) -> str:
    folder = fresh_folder(title)
    wrong = trial(kind, rng_of(seed, title), folder)
    if not wrong:
        shutil.rmtree(folder)
    return wrong
