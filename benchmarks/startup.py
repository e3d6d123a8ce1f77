"""How long does the command take to answer --help, and to refuse a flag?

python benchmarks/startup.py
"""

import argparse
import subprocess
import sys
import time
from functools import partial

from common import ROOT, compare, machine_name

CALL = "from corel_diffusers.cli import main; main()"
CALLS = {
    "corel-diffusers --help": ["-c", CALL, "--help"],
    "a refused flag": ["-c", CALL, "generate", "--num-images", "0"],
    "train_unet.py --help": ["train_unet.py", "--help"],
    "train_vae.py, a refused flag": ["train_vae.py", "--epochs", "0"],
    "Python by itself": ["-c", "pass"],
}


def seconds(arguments: list[str]) -> list[float]:
    """Run Python with these arguments and return a list with the seconds that it took."""
    start = time.monotonic()
    subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
    )
    return [time.monotonic() - start]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    sides = {name: partial(seconds, arguments) for name, arguments in CALLS.items()}
    print(machine_name("cpu"), compare("start", sides, args.repeats, "ms"), sep="\n")
