"""How long does the command take to say what it can do, and to refuse a flag?

python benchmarks/startup.py
"""

import argparse
import subprocess
import sys
import time
from functools import partial

from common import ROOT, compare, machine

CALL = "from corel_diffusers.cli import main; main()"
ASKED = {
    "corel-diffusers --help": ["-c", CALL, "--help"],
    "a refused flag": ["-c", CALL, "generate", "--num-images", "0"],
    "train_unet.py --help": ["train_unet.py", "--help"],
    "train_vae.py, a refused flag": ["train_vae.py", "--epochs", "0"],
    "Python by itself": ["-c", "pass"],
}


def seconds(words: list[str]) -> list[float]:
    began = time.monotonic()
    subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return [time.monotonic() - began]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    sides = {name: partial(seconds, words) for name, words in ASKED.items()}
    print(machine("cpu"), compare("start", sides, args.repeats, "ms"), sep="\n")
