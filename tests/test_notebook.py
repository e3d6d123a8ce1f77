"""The notebook runs to its end, with fewer steps and with a folder of photos."""

from pathlib import Path

import nbformat
import pytest
from conftest import ROOT, make_photos
from nbclient import NotebookClient

# in the kernel: the training commands get a few steps in place of their minutes
FEWER_STEPS = """
from corel_diffusers.config.train import Train

commands = Train.commands


def with_few_steps(args):
    for words in commands(args):
        if "--max-train-minutes" in words:
            words[-2:] = ["--max-train-steps", "4", "--batch-size", "4", "--mixed-precision", "no"]
            words += ["--max-train-samples", "24", "--attention", "fused"]
        if words[0] == "train-vae":
            words += ["--image-size", "32"]
        yield words


Train.commands = with_few_steps
"""

SMALLER = {
    'cd.train("scenes"': 'cd.train("photos"',  # each command would load 1,200 scenes, which takes minutes
    "num_images = 5, 64": "num_images = 5, 8",
    'my_photos, minutes = ""': "my_photos, minutes = 'photos'",
    'output_dir="quickstart/mine"': 'output_dir="quickstart/scenes"',  # these photos are trained on already
    "num_inference_steps=50": "num_inference_steps=2",
}


@pytest.mark.slow
def test_the_notebook_runs_to_its_end(tmp_path: Path, monkeypatch):
    make_photos(tmp_path / "photos", each=18)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs"), "the notebook is saved without outputs"
        for old, new in SMALLER.items():
            cell.source = cell.source.replace(old, new)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(FEWER_STEPS))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [
        output for cell in notebook.cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})
    ]
    # the curves and the grid of both runs, the grid of classes, the picture of DDIM, and the pictures of the photos
    assert len(shown) == 2 * 3 + 3
    assert "would push" in notebook.cells[-1].outputs[-1].text
