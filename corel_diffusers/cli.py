"""The command `corel-diffusers`: parse the flags, check them, and run the subcommand.

The flags are checked before heavy modules such as torch are imported, so an error in a flag appears at once.
"""

import tyro

from corel_diffusers.config.checks import user_path
from corel_diffusers.config.commands import Evaluate, Generate, Prepare, Push
from corel_diffusers.files import one_line_errors


def run_prepare(args: Prepare) -> None:
    from corel_diffusers.data.prepare import prepare

    names = args.data_dir, args.output_dir, args.figs_dir
    data_dir, output_dir, figs_dir = (user_path(args.base_dir, name) for name in names)
    figs_dir = figs_dir if args.visualize else None
    prepare(data_dir, output_dir, figs_dir, args.layout, args.trim_borders, args.strict, args.test_fraction)


def run_generate(args: Generate) -> None:
    from corel_diffusers.sampling.generate import generate

    generate(args, user_path(args.base_dir, args.output))


def run_evaluate(args: Evaluate) -> None:
    from corel_diffusers.evaluation.evaluate import evaluate
    from corel_diffusers.hub import write_card

    evaluate(args)
    if not args.pictures and args.results_dir == args.pipeline_location:
        write_card(args.results_dir)


def run_push(args: Push) -> None:
    from corel_diffusers.hub import push

    push(args.folder, args.repo_id, args.private, args.dry_run)


def main() -> None:
    """Parse the command line, check the flags and run the subcommand. Heavy modules are imported after the check."""
    runners = {Prepare: run_prepare, Generate: run_generate, Evaluate: run_evaluate, Push: run_push}
    with one_line_errors():
        subcommands = {kind.__name__.lower(): kind for kind in runners}
        args = tyro.extras.subcommand_cli_from_dict(subcommands, prog="corel-diffusers").checked()
        runners[type(args)](args)
