"""A full disk at each kind of write of each command. It needs the right to mount a small file system (root).

Right: one line that names the place, the older state is whole, and the same command goes on after room was made.
"""

import os
import shutil
import subprocess
from functools import partial
from pathlib import Path

from common import Base, Trial, fresh_folder, rng_of, run, same_run

SIZE = 24 * 2**20


def mount(folder: Path) -> bool:
    """Mount a small file system, and return whether that was possible."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


def fill(disk: Path, free_bytes: int) -> Path:
    """Fill the disk until this many bytes are free."""
    filler = disk / "filler"
    space = os.statvfs(disk)
    left = max(0, space.f_bavail * space.f_frsize - free_bytes)
    with filler.open("wb") as file:
        file.write(b"x" * left)
    return filler


def commands(base: Base, disk: Path) -> dict[str, tuple[list[object], Path | None]]:
    """Return the words and the cache of each command that writes to the disk."""
    generate = [
        "generate",
        "--pipeline",
        base.unet,
        "--num-images",
        12,
        "--steps",
        2,
        "--seed",
        1,
        "--output",
        disk / "g.png",
    ]
    return {
        "train_vae": (base.train_vae(disk / "run"), None),
        "train_unet": (base.train_unet(disk / "run"), None),
        "the cache of train_vae": (base.train_vae(disk.parent / "run"), disk / "cache"),
        "the cache of train_unet": (base.train_unet(disk.parent / "run"), disk / "cache"),
        "prepare": (["prepare", "--data-dir", base.photos, "--output-dir", disk / "p", "--figs-dir", disk / "f"], None),
        "generate": (generate, None),
        "evaluate": (
            [
                "evaluate",
                "--pipeline",
                base.unet,
                "--data-dir",
                base.photos,
                "--num-images",
                8,
                "--steps",
                2,
                "--against",
                "all",
                "--output-dir",
                disk / "e",
            ],
            None,
        ),
    }


def trial(base: Base, command: str, used: int, seed: int, index: int) -> str:
    folder, rng = fresh_folder(f"disk {index}"), rng_of(seed, "disk", index)
    disk = folder / "disk"
    if not mount(disk):
        return "no file system can be mounted here"
    try:
        words, cache = commands(base, disk)[command]
        filler = fill(disk, rng.randrange(0, max(1, used)))
        done = run(*words, folder=folder, cache=cache)
        if done.code:
            if wrong := done.refused():
                return wrong
            if str(disk) not in done.last_line and "cannot be written" not in done.last_line:
                return f"the place is not named: {done.last_line}"
        filler.unlink()
        resume = ["--resume", "latest"] if command.startswith(("train", "the cache")) else []
        again = run(*words, *resume, folder=folder, cache=cache)
        if again.code and "a finished run" not in again.output:
            return f"afterwards: exit code {again.code}: {again.last_line}"
        if resume:
            output = Path(words[words.index("--output-dir") + 1])
            return same_run(base.vae if "vae" in command else base.unet, output)
        return ""
    finally:
        subprocess.run(["umount", "-l", str(disk)], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def trials(base: Base, seed: int, count: int = 63) -> list[Trial]:
    used = {}
    for command in commands(base, Path("disk")):
        disk = fresh_folder(f"reference {command}") / "disk"
        if not mount(disk):
            print("no file system can be mounted here: the trials of full disks are left out")
            return []
        before = os.statvfs(disk).f_bavail
        words, cache = commands(base, disk)[command]
        done = run(*words, folder=disk.parent, cache=cache)
        assert done.code == 0, done.output
        used[command] = (before - os.statvfs(disk).f_bavail) * os.statvfs(disk).f_frsize
        subprocess.run(["umount", "-l", str(disk)], capture_output=True)
    names = [list(used)[index % len(used)] for index in range(count)]
    return [Trial(f"{name}, {i}", partial(trial, base, name, used[name], seed, i)) for i, name in enumerate(names)]
