"""Imported by the server process that all programs of the trials are forked from. See common.py."""

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parent)]

import torch
import torch._dynamo

import train_unet
import train_vae
from corel_diffusers import cli
from corel_diffusers.config.parsing import parse
from corel_diffusers.data import cache, prepare, scenes
from corel_diffusers.evaluation import evaluate, judge, memorization
from corel_diffusers.files import one_line_errors
from corel_diffusers.hub import upload
from corel_diffusers.sampling import generate
from corel_diffusers.training import start

torch.set_num_threads(1)
IMPORTED = (cli, prepare, scenes, evaluate, judge, memorization, upload, generate, torch._dynamo)
SCRIPTS = {"train_vae.py": (train_vae, train_vae.VAEArguments), "train_unet.py": (train_unet, train_unet.UNetArguments)}


def run_program(
    words: list[str], folder: str, cache_dir: str, log: str, env: dict, before: tuple, new_group: bool
) -> None:
    """Run a script or a command in this process, as if it had been started from the shell. See common.Program."""
    os.chdir(folder)
    os.environ.update(env)
    multiprocessing.set_start_method("fork", force=True)  # of workers, as in a script on Linux
    if new_group:
        os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    cache.CACHE_DIR = Path(cache_dir)
    code = 0
    try:
        with one_line_errors():
            print("started", flush=True)
            run_words(words, before)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def run_words(words: list[str], before: tuple) -> None:
    """Run `main` of a script or of the command."""
    if before:
        module, function, *arguments = before
        getattr(importlib.import_module(module), function)(*arguments)
    if words[0] in SCRIPTS:
        module, kind = SCRIPTS[words[0]]
        sys.argv = words
        flags = parse(kind)
        start.run_script(module.main, flags)
    else:
        sys.argv = ["corel-diffusers", *words]
        cli.main()
