"""The command `corel-diffusers`: parse the flags, check them, and run the subcommand.

The flags are checked before heavy modules such as torch are imported, so an error in a flag appears at once.
"""

from pathlib import Path

import tyro

from corel_diffusers.config.commands import Evaluate, Generate, Prepare, Push
from corel_diffusers.files import one_line_errors


def run_prepare(args: Prepare) -> None:
    from corel_diffusers.data.prepare import prepare

    base = Path(args.base_dir)
    figs_dir = base / args.figs_dir if args.visualize else None
    folders = base / args.data_dir, base / args.output_dir, figs_dir
    prepare(*folders, args.layout, args.trim_borders, args.strict, args.test_fraction)


def run_generate(args: Generate) -> None:
    from corel_diffusers.sampling.generate import generate

    generate(args, Path(args.base_dir) / args.output)


def run_evaluate(args: Evaluate) -> None:
    from corel_diffusers.evaluation.evaluate import evaluate
    from corel_diffusers.hub import write_card

    evaluate(args, args.photo_source, args.results_dir)
    if args.results_dir == args.pipeline:
        write_card(args.results_dir)


def run_push(args: Push) -> None:
    from corel_diffusers.hub import push

    push(args.folder, args.repo_id, args.private, args.dry_run)


def main() -> None:
    """Parse the command line, check the flags and run the subcommand. Heavy modules are imported after the check."""
    subcommands = {
        "prepare": (Prepare, run_prepare),
        "generate": (Generate, run_generate),
        "evaluate": (Evaluate, run_evaluate),
        "push": (Push, run_push),
    }
    with one_line_errors():
        flags = {name: kind for name, (kind, _) in subcommands.items()}
        args = tyro.extras.subcommand_cli_from_dict(flags, prog="corel-diffusers")
        args.check()
        next(run for kind, run in subcommands.values() if type(args) is kind)(args)
