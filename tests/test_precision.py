"""The mixed precision of forward passes, and the attention kernel."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.profiler import ProfilerActivity, profile

from corel_diffusers.files import UserError
from corel_diffusers.models.unet import build_unet
from corel_diffusers.models.vae import build_vae
from corel_diffusers.runtime.precision import arithmetic, autocast, resolve_precision, set_precision


def test_fp16_without_a_gpu_is_refused(monkeypatch):
    with pytest.raises(UserError, match="--mixed-precision fp16 needs a GPU"):
        resolve_precision("fp16", "cpu")
    assert resolve_precision("auto", "cuda") == "fp16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        resolve_precision("auto", "cpu")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert resolve_precision("auto", "cpu") == "bf16"


@pytest.mark.parametrize(("precision", "expected"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_a_matrix_product_runs_in_the_given_precision(precision, expected):
    with autocast(precision, "cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected


@pytest.mark.parametrize(("precision", "expected"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_a_bf16_accelerator_runs_in_the_precision_that_is_set(precision, expected):
    AcceleratorState._reset_state(True)
    accelerator, dtypes = Accelerator(cpu=True, mixed_precision="bf16"), []
    set_precision(accelerator, precision)
    inner = torch.nn.Linear(2, 2)
    inner.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    accelerator.prepare(torch.nn.Sequential(inner))(torch.ones(1, 2))
    with accelerator.autocast():
        dtypes.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
    assert dtypes == [expected, expected]
    AcceleratorState._reset_state(True)


def test_a_unet_runs_in_the_attention_kernel_that_it_was_built_with():
    names = {}
    for attention in ("math", "fused"):
        unet = build_unet("tiny", (32, 32), build_vae("tiny", (32, 32)), None, attention=attention)
        with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as profiled:
            unet(torch.randn(1, 4, 8, 8), 10)
        names[attention] = {event.key for event in profiled.key_averages()}
    assert not any("scaled_dot_product" in key for key in names["math"])
    assert any("flash" in key for key in names["fused"])


def test_the_name_of_the_arithmetic_depends_on_tf32(monkeypatch):
    assert arithmetic(torch.device("cpu")) == torch.backends.cpu.get_cpu_capability().lower()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    names = set()
    for convolutions in (True, False):
        for products in (True, False):
            monkeypatch.setattr(torch.backends, "cudnn", SimpleNamespace(allow_tf32=convolutions))
            monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=products))
            names.add(arithmetic(torch.device("cuda")))
    assert names == {"sm90-tf32", "sm90-tf32conv", "sm90-tf32matmul", "sm90"}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert arithmetic(torch.device("cuda")) == "sm75", "older GPUs have no TF32"
