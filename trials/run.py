"""Try the toolkit by force: kill it, damage its files, fill its disk, lie to it.

python trials/run.py                         all kinds, with the full counts: two to three hours on two cores
python trials/run.py kills damage --count 40 --seed 7

Prints a line for each trial that went wrong, and a table of counts at the end, which is also written to --output. The
same seed gives the same trials. The exit code is 1 if one went wrong.
"""

import argparse
import importlib.util
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import ROOT, Base, Trial

KINDS = ("kills", "damage", "disks", "pictures", "flags", "strangers", "not_finite", "signals", "soak")
IN_THIS_PROCESS = ("pictures", "flags")  # they change sys.argv and sys.stdout, so one runs after the other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--count", type=int, help="trials of each kind (default: the full count)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=2, help="trials that run at the same time")
    parser.add_argument("--output", type=Path, help="file for the table of counts")
    args = parser.parse_args()
    if unknown := set(args.kinds) - set(KINDS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; the kinds are {', '.join(KINDS)}")
    base, wrong = Base(), 0
    rows = ["| kind | trials | right | minutes |", "|---|---|---|---|"]
    for kind in args.kinds or KINDS:
        start, module = time.monotonic(), importlib.import_module(kind)
        trials = module.trials(base, args.seed, *([args.count] if args.count else []))
        failed = 0
        with ThreadPoolExecutor(1 if kind in IN_THIS_PROCESS else args.at_once) as pool:
            for trial, result in zip(trials, pool.map(attempt, trials), strict=True):
                if result:
                    failed += 1
                    print(f"WRONG  {kind}: {trial.name}: {result}", flush=True)
        rows.append(f"| {kind} | {len(trials)} | {len(trials) - failed} | {(time.monotonic() - start) / 60:.1f} |")
        print(rows[-1], flush=True)
        wrong += failed
    table = "\n".join([f"seed {args.seed}, {machine_name()}", "", *rows])
    print(f"\n{table}")
    if args.output:
        args.output.write_text(table + "\n")
    sys.exit(int(wrong > 0))


def machine_name() -> str:
    """Return the description of the machine that the benchmarks use."""
    spec = importlib.util.spec_from_file_location("benchmarks_common", ROOT / "benchmarks" / "common.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.machine_name("cpu")


def attempt(trial: Trial) -> str:
    """Run a trial, and return what is wrong."""
    try:
        return trial.run()
    except Exception as error:
        return f"the trial itself failed: {type(error).__name__}: {error}"


if __name__ == "__main__":
    main()
