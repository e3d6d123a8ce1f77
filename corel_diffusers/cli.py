"""The command `corel-diffusers`: parse the flags, check them, and run the subcommand.

The flags are checked before heavy modules such as torch are imported, so an error in a flag appears at once.
"""

import gc
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import tyro

from corel_diffusers import __version__
from corel_diffusers.config.checks import MIN_PHOTOS, is_main_process, user_path
from corel_diffusers.config.commands import Evaluate, Generate, Prepare, Push, PushDataset, TuneDecoder
from corel_diffusers.config.parsing import parse, parse_command, use_files_for_plots
from corel_diffusers.config.train import Env, Train
from corel_diffusers.config.training import TrainingArguments
from corel_diffusers.config.unet import UNetArguments
from corel_diffusers.config.vae import VAEArguments
from corel_diffusers.files import UserError, explain_full_disk, one_line_errors
from corel_diffusers.saved_models import decoder_tuning

if TYPE_CHECKING:
    from PIL import Image

# `corel-diffusers`, wherever it is; -P: no module is imported from the folder that the user is in
COMMAND = [sys.executable, "-P", "-c", "from corel_diffusers.cli import main; main()"]


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import torch without the garbage collector, which would look at a million new objects again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def run_prepare(args: Prepare) -> None:
    from corel_diffusers.data.prepare import prepare

    names = args.data_dir, args.output_dir, args.figs_dir
    data_dir, output_dir, figs_dir = (user_path(args.base_dir, name) for name in names)
    figs_dir = figs_dir if args.visualize else None
    with explain_full_disk(output_dir, "--output-dir"):
        prepare(data_dir, output_dir, figs_dir, args.layout, args.trim_borders, args.strict, args.test_fraction)


def run_in_own_process(words: list[str]) -> None:
    """Run a command in a process of its own, which gives back all its memory. End with its exit code if it fails."""
    print(f"corel-diffusers {' '.join(words)}", flush=True)
    # in a session of its own, so that a signal to all processes of a terminal reaches it once: through this process
    process, code, stopped = subprocess.Popen([*COMMAND, *words], start_new_session=True), None, 0
    while code is None:
        try:
            code = process.wait()
        except SystemExit as signalled:  # see `exit_with_signal`: the command saves a checkpoint and ends
            stopped = signalled.code
            with suppress(ValueError):  # on Windows, the console has sent Ctrl-C to both
                process.send_signal(stopped - 128)
    if stopped:
        print("to continue, give the same command again", file=sys.stderr)
    if code or stopped:
        sys.exit(stopped or (code if code > 0 else 128 - code))


def run_train(args: Train, run: Callable[[list[str]], None] = run_in_own_process) -> None:
    """Run the commands of `Train.commands`, one after the other."""
    vae_dir, pipeline_dir = args.folders()
    if args.finished_vae_minutes():
        print(f"{vae_dir} stays as it is, because the UNet trains on its latents: more minutes go to the UNet")
    for words in args.commands():
        if words[0] in ("tune-decoder", "evaluate") and not is_main_process():
            return
        if words[0] == "tune-decoder" and decoder_tuning(pipeline_dir):
            print(f"tuned before: the decoder of {pipeline_dir}")
        elif words[0] == "evaluate" and not args.can_be_evaluated():
            print(f"notice: there are fewer than {MIN_PHOTOS} held-out photos: the pipeline is not evaluated")
        elif words[0] == "evaluate" and is_evaluated(args):
            print(f"evaluated before: {pipeline_dir / 'evaluation.html'}")
        else:
            run(words)
    print(f"samples, a row for each class: {pipeline_dir / 'grid.png'}")


def is_evaluated(args: Train) -> bool:
    """Return whether the pipeline folder has an evaluation of its weights with as many samples."""
    _, folder = args.folders()
    if not (folder / "evaluation.json").is_file():
        return False
    with heavy_imports():
        from corel_diffusers.hub.cards import evaluation_of

    evaluation = evaluation_of(folder)
    return bool(evaluation) and evaluation["generation"]["n"][0] == args.num_images


def run_training_script(args: TrainingArguments) -> None:
    with heavy_imports():
        from corel_diffusers.training.start import run_script

        script = importlib.import_module(args.script)  # train_vae.py or train_unet.py
    run_script(script.main, args)


def run_generate(args: Generate) -> "list[Image.Image]":
    with heavy_imports():
        from corel_diffusers.sampling.generate import generate

    return generate(args, user_path(args.base_dir, args.output))


def run_evaluate(args: Evaluate) -> dict:
    with heavy_imports():
        from corel_diffusers.evaluation.evaluate import evaluate
        from corel_diffusers.hub.cards import write_card

    results = evaluate(args)
    if not args.pictures and args.results_dir == args.pipeline_location:
        write_card(args.results_dir)
    return results


def run_tune_decoder(args: TuneDecoder) -> None:
    with heavy_imports():
        from corel_diffusers.decoder_tuning import tune_decoder

    tune_decoder(args)


def run_push(args: Push) -> str | None:
    from corel_diffusers.hub.upload import push, require_accepted_token

    if not args.dry_run:
        require_accepted_token()
    return push(args.folder, args.repo_id, args.private, args.dry_run, args.revision, args.license)


def run_push_dataset(args: PushDataset) -> None:
    from corel_diffusers.hub.upload import push_dataset, require_accepted_token

    if not args.dry_run:
        require_accepted_token()
    push_dataset(args.folder, args.repo_id, not args.public, args.dry_run, args.license)


def run_env(args: Env) -> None:
    from corel_diffusers.environment import environment

    print(environment())


COMMANDS = {
    "train": (Train, run_train),
    "prepare": (Prepare, run_prepare),
    "train-vae": (VAEArguments, run_training_script),
    "train-unet": (UNetArguments, run_training_script),
    "tune-decoder": (TuneDecoder, run_tune_decoder),
    "generate": (Generate, run_generate),
    "evaluate": (Evaluate, run_evaluate),
    "push": (Push, run_push),
    "push-dataset": (PushDataset, run_push_dataset),
    "env": (Env, run_env),
}


def main() -> None:
    """Parse the command line, check the flags and run the subcommand. Heavy modules are imported after the check."""
    words = sys.argv[1:]
    if words == ["--version"]:
        print(f"corel-diffusers {__version__}")
        return
    use_files_for_plots()
    with one_line_errors():
        if not words or words[0] not in COMMANDS:
            if words and words[0] not in ("-h", "--help"):
                raise UserError(f"there is no command {words[0]}: give one of {', '.join(COMMANDS)}")
            # prints the help and exits
            tyro.extras.subcommand_cli_from_dict(
                {name: kind for name, (kind, _) in COMMANDS.items()}, prog="corel-diffusers", args=words
            )
        (kind, run), prog, words = COMMANDS[words[0]], f"corel-diffusers {words[0]}", words[1:]
        if issubclass(kind, TrainingArguments):
            run(parse(kind, words, prog))
        else:
            run(parse_command(kind, words, prog))
