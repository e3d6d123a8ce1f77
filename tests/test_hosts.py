"""Two machines: two hosts in network namespaces, each with a cache of its own, joined by a virtual cable, over gloo."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, UNET_CONFIG, run_here

HOSTS = {f"corel{os.getpid()}{side}": f"10.77.0.{place}" for place, side in enumerate("ab", 1)}


@pytest.fixture
def network() -> Iterator[None]:
    if not shutil.which("ip") or subprocess.run(["ip", "netns", "add", next(iter(HOSTS))], capture_output=True).returncode:
        pytest.skip("network namespaces need root and iproute2")
    first, second = HOSTS
    try:
        for words in (
            f"netns add {second}",
            f"link add cable0 netns {first} type veth peer name cable0 netns {second}",
            *(f"-n {host} addr add {address}/24 dev cable0" for host, address in HOSTS.items()),
            *(f"-n {host} link set {device} up" for host in HOSTS for device in ("lo", "cable0")),
        ):
            subprocess.run(["ip", *words.split()], check=True, capture_output=True)
        yield
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", host], check=False, capture_output=True)


def on_both_hosts(folder: Path, *flags: object) -> None:
    """torchrun on each, as the README says, until both have ended well. They share no disk but for the photos and the VAE."""
    (address, *_), running = HOSTS.values(), []
    for rank, host in enumerate(HOSTS):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--node_rank", rank, "--nproc_per_node", 1]
        joined = ["--master_addr", address, "--master_port", 29535]
        script = [ROOT / "train_unet.py", "--output-dir", folder / host / "run", *flags]
        words = ["ip", "netns", "exec", host, *torchrun, *joined, *script]
        env = {
            "ACCELERATE_USE_CPU": "true",
            "GLOO_SOCKET_IFNAME": "cable0",
            "HF_HOME": str(folder / host / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        running.append(
            subprocess.Popen(
                list(map(str, words)), cwd=ROOT, env=os.environ | env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    told = [process.communicate(timeout=240)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(told)


def test_two_machines_are_one_with_the_same_global_batch(network, unet_flags, configs, tmp_path):
    """Resumed in between; without dropout, which each process draws for itself."""
    config = configs / "on-two-hosts.json"
    config.write_text(json.dumps(UNET_CONFIG | {"dropout": 0.0}))
    common = [*unet_flags, "--config", config, "--lr", 1e-3, "--lr-scheduler", "none"]
    run_here("train_unet", [*common, "--output-dir", tmp_path / "one", "--batch-size", 4, "--epochs", 2])
    on_both_hosts(tmp_path, *common, "--batch-size", 2, "--epochs", 1)
    on_both_hosts(tmp_path, *common, "--batch-size", 2, "--epochs", 2, "--resume", "latest")
    first, second = (tmp_path / host / "run" for host in HOSTS)
    assert not second.exists(), "only the first process writes"
    alone, together = ([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (tmp_path / "one", first))
    assert [line["step"] for line in alone] == [line["step"] for line in together]
    for a, b in zip(alone, together, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=2e-3)
