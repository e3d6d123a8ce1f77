"""Training on two machines: two network namespaces with separate caches, joined by a virtual cable, with gloo."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, UNET_CONFIG, run_here

HOSTS = {f"corel{os.getpid()}{side}": f"10.77.0.{number}" for number, side in enumerate("ab", 1)}  # namespace: address


@pytest.fixture
def network() -> Iterator[None]:
    """Create the two network namespaces and the cable between them. Skip the test if this is not possible."""
    if (
        not shutil.which("ip")
        or subprocess.run(["ip", "netns", "add", next(iter(HOSTS))], capture_output=True).returncode
    ):
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
    """Run torchrun on both hosts, as in docs/multi-gpu.md, and check that both succeed.

    The hosts share no folders except those of the photos and the VAE.
    """
    (address, *_), processes = HOSTS.values(), []
    for rank, host in enumerate(HOSTS):
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes",
            2,
            "--node_rank",
            rank,
            "--nproc_per_node",
            1,
        ]
        rendezvous = ["--master_addr", address, "--master_port", 29535]
        script = [ROOT / "train_unet.py", "--output-dir", folder / host / "run", *flags]
        words = ["ip", "netns", "exec", host, *torchrun, *rendezvous, *script]
        env = {
            "ACCELERATE_USE_CPU": "true",
            "GLOO_SOCKET_IFNAME": "cable0",
            "HF_HOME": str(folder / host / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        processes.append(
            subprocess.Popen(
                list(map(str, words)),
                cwd=ROOT,
                env=os.environ | env,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)


def test_two_machines_train_like_one_with_the_same_global_batch(network, unet_flags, configs, tmp_path):
    """The run on two machines is also interrupted and resumed.

    There is no dropout, because each process draws its own dropout masks.
    """
    config = configs / "on-two-hosts.json"
    config.write_text(json.dumps(UNET_CONFIG | {"dropout": 0.0}))
    common = [*unet_flags, "--config", config, "--lr", 1e-3, "--lr-scheduler", "none"]
    run_here("train_unet", [*common, "--output-dir", tmp_path / "one", "--batch-size", 4, "--epochs", 2])
    on_both_hosts(tmp_path, *common, "--batch-size", 2, "--epochs", 1)
    on_both_hosts(tmp_path, *common, "--batch-size", 2, "--epochs", 2, "--resume", "latest")
    first, second = (tmp_path / host / "run" for host in HOSTS)
    assert not second.exists(), "only the main process writes"
    one_machine, two_machines = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (tmp_path / "one", first)
    )
    assert [record["step"] for record in one_machine] == [record["step"] for record in two_machines]
    for one, two in zip(one_machine, two_machines, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=2e-3)
        assert one["val_loss"] == pytest.approx(two["val_loss"], rel=2e-3)
