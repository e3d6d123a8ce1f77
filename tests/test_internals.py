"""The private parts of other libraries that internals.py uses. A failure names what an upgrade has changed."""

import io

import numpy as np
import pytest
import torch
from accelerate.utils import AutocastKwargs
from datasets import Dataset, load_from_disk
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image
from test_decoding import png_of_16_bits
from torch import nn

from corel_diffusers import internals


class Doubled(nn.Linear):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(values)


def test_the_cpu_says_whether_it_has_bf16():
    try:
        answer = internals.has_bf16_in_hardware()
    except AttributeError as error:
        pytest.fail(f"torch.cpu has renamed a function: {error}. --mixed-precision auto needs it.")
    assert isinstance(answer, bool)


def test_a_module_with_another_class_keeps_its_weights():
    module = nn.Linear(2, 2)
    expected, names = 2 * module(torch.ones(1, 2)), list(module.state_dict())
    internals.set_class(module, Doubled)
    assert torch.equal(module(torch.ones(1, 2)), expected), "torch no longer calls the forward of a changed class."
    assert list(module.state_dict()) == names, "A changed class changes the names of the weights in a checkpoint."


def test_the_blocks_of_diffusers_have_the_parts_that_the_fast_layers_use():
    block = ResnetBlock2D(in_channels=4, out_channels=8, temb_channels=4, groups=2)
    parts = ["norm1", "conv1", "norm2", "conv2", "nonlinearity", "dropout", "time_emb_proj", "time_embedding_norm"]
    parts += ["conv_shortcut", "up", "down", "skip_time_act", "output_scale_factor"]
    missing = [name for name in parts if not hasattr(block, name)]
    assert not missing, f"diffusers has renamed {missing} of ResnetBlock2D: models/layers.py uses them."


def test_compiling_is_undone():
    module, calls = Doubled(2, 2), []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> object:
        return lambda *values: (calls.append(1), graph(*values))[1]

    module.compile(backend=backend)
    module(torch.ones(1, 2))
    internals.undo_compile(module)
    before = len(calls)
    module(torch.ones(1, 2))
    assert before, "torch no longer compiles a module with Module.compile."
    assert len(calls) == before, "Module.compile of torch keeps the compiled call elsewhere: --compile cannot undo it."


def test_the_original_forward_comes_back():
    module = nn.Linear(2, 2)
    module.forward = lambda values: values  # as make_graphed_callables does
    internals.undo_graph_capture(module)
    assert module(torch.ones(1, 2)).grad_fn, "A module keeps a replaced forward elsewhere: CUDA graphs stay in use."


def test_tensors_are_found_in_nested_outputs():
    a, b, c = torch.zeros(1), torch.ones(1), torch.ones(2)
    found = internals.tensors_in((a, [b, None], {"c": c}))
    assert [id(values) for values in found] == [id(a), id(b), id(c)], "torch's pytree lists leaves in another order."


@pytest.mark.parametrize("enabled", [True, False])
def test_fast_autocast_gives_the_arguments_of_accelerate(enabled):
    fast = internals.FastAutocast(enabled=enabled).to_kwargs()
    theirs = vars(AutocastKwargs(enabled=enabled))
    assert fast == theirs, "AutocastKwargs of accelerate has other arguments, and FastAutocast does not pass them on."


def test_the_fingerprint_of_a_dataset_depends_on_its_content(tmp_path):
    datasets = [Dataset.from_dict({"a": values}) for values in ([1, 2], [1, 2], [1, 3])]
    for number, dataset in enumerate(datasets):
        dataset.save_to_disk(str(tmp_path / str(number)))
    first, again, other = (internals.fingerprint(load_from_disk(str(tmp_path / name))) for name in "002")
    assert first == again, "`datasets` gives the same data a new fingerprint in each run: the caches are never used."
    assert first != other, "`datasets` gives other data the same fingerprint: the caches would be wrong."


def test_both_bytes_of_16_bit_colours_can_be_read():
    values = np.random.default_rng(0).integers(0, 2**16, (8, 9, 3)).astype(np.uint16)
    high, low = Image.open(io.BytesIO(png_of_16_bits(values))), Image.open(io.BytesIO(png_of_16_bits(values)))
    mode = internals.raw_mode_of_low_bytes(high)
    assert mode, "Pillow names its decoders of 16-bit colours differently: 12-bit photos would be black."
    internals.read_with(low, mode)
    both = 256 * np.asarray(high).astype(int) + np.asarray(low)
    assert np.array_equal(both, values), "Pillow's decoder gives other bytes of 16-bit colours."
    assert internals.raw_mode_of_low_bytes(Image.new("RGB", (8, 8))) is None
