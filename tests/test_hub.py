"""Push and load with the real Hub client, over HTTP, from a local server that stands in for the Hub."""

import json
import shutil
import sys

import numpy as np
import pytest
from conftest import launch, run_here, script, tool, tool_here
from datasets import load_dataset
from diffusers import DiffusionPipeline, UNet2DModel
from hub_server import TOKEN, HubServer
from huggingface_hub import DatasetCard, ModelCard
from safetensors.torch import load_file

from corel_diffusers.data.photos import load_photos
from corel_diffusers.files import UserError
from corel_diffusers.hub import cards
from corel_diffusers.hub.cards import WRITTEN_BY, write_card
from corel_diffusers.sampling.pipelines import weights_digests

LOAD = """
import sys
sys.modules["corel_diffusers"] = sys.modules["transformers"] = None  # importing them fails
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
for name, model in pipe.components.items():
    if hasattr(model, "parameters"):
        model.save_pretrained(f"{sys.argv[2]}/{name}")
pipe(1, 0, num_inference_steps=2)
"""


@pytest.fixture
def hub():
    """A local server that stands in for the Hub."""
    with HubServer() as server:
        yield server


def check_loaded(hub, repo_id, source, folder, parts=("unet", "vae")):
    """Check that the Hub gives the same weights, bit for bit.

    They are loaded with an empty cache in a process without this package.
    """
    launch(
        sys.executable, "-c", LOAD, repo_id, folder / "loaded", env=hub.env(folder / "empty-cache") | {"PYTHONPATH": ""}
    )
    for part in parts:
        original, loaded = (
            load_file(root / part / "diffusion_pytorch_model.safetensors") for root in (source, folder / "loaded")
        )
        assert original.keys() == loaded.keys()
        assert all((original[name] == loaded[name]).all() for name in original)


def test_a_pushed_pipeline_loads_with_the_same_weights(hub, trained_unet, tmp_path):
    guided = tmp_path / "guided"
    shutil.copytree(trained_unet, guided)
    pipe = DiffusionPipeline.from_pretrained(guided, trust_remote_code=True)
    pipe.register_modules(guide=UNet2DModel.from_config(pipe.unet.config))
    pipe.save_pretrained(guided)
    pushed = tool("push", "--pipeline", guided, "--repo-id", "user/corel", "--private", env=hub.env(tmp_path / "home"))
    assert "pushed: " in pushed.stdout
    assert hub.private
    files = hub.repos["user/corel"]
    assert {
        "model_index.json",
        "pipeline.py",
        "README.md",
        "grid.png",
        "unet/diffusion_pytorch_model.safetensors",
    } <= set(files)
    assert not [
        name for name in files if "checkpoint" in name or "samples" in name or "metrics" in name or "run.json" in name
    ]
    assert TOKEN not in pushed.stdout + pushed.stderr
    assert not any(TOKEN.encode() in content for content in files.values())
    assert 'from_pretrained("user/corel"' in files["README.md"].decode()
    assert "\n# corel\n" in files["README.md"].decode()
    assert "pipe.guide = None" in files["README.md"].decode()
    check_loaded(hub, "user/corel", guided, tmp_path, parts=("unet", "guide", "vae"))
    generated = tool(
        "generate", "--pipeline", "user/corel", "--trust-remote-code", "--base-dir", tmp_path, "--num-images", 1,
        "--ddim-steps", 2, env=hub.env(tmp_path / "another-cache"),
    )  # fmt: skip
    assert "grid: " in generated.stdout
    hub.private = False
    refused = tool(
        "push",
        "--pipeline",
        guided,
        "--repo-id",
        "user/corel",
        "--private",
        env=hub.env(tmp_path / "home"),
        check=False,
    )
    assert refused.returncode == 2
    assert "it exists and is public" in refused.stderr
    pipe.guide = None
    pipe.save_pretrained(guided)
    listed = tool_here("push", "--pipeline", guided, "--repo-id", "user/corel", "--dry-run").stdout
    assert "unet/" in listed
    assert "guide/" not in listed, "the folder that is left is not part of the pipeline"


def test_train_unet_pushes_when_training_ends(hub, unet_flags, tmp_path):
    folder = tmp_path / "run"
    flags = ["--output-dir", folder, "--max-train-steps", 2, "--push-to-hub", "--hub-model-id", "user/fresh"]
    script("train_unet", *unet_flags, *flags, env={k: v for k, v in hub.env("").items() if k != "HF_HOME"})
    check_loaded(hub, "user/fresh", folder, tmp_path)
    assert hub.private, "a repository is private unless --hub-public is given"


def test_train_vae_pushes_the_vae_and_its_newest_checkpoint(hub, vae_flags, tmp_path):
    folder = tmp_path / "run"
    flags = ["--output-dir", folder, "--max-train-steps", 2, "--checkpoint-steps", 1, "--push-to-hub"]
    flags += ["--hub-model-id", "user/vae", "--hub-strategy", "checkpoint"]
    env = {k: v for k, v in hub.env("").items() if k != "HF_HOME"}
    script("train_vae", *vae_flags, *flags, env=env)
    assert hub.private, "a repository is private unless --hub-public is given"
    files = hub.repos["user/vae"]
    assert {n.split("/")[1] for n in files if n.startswith("last-checkpoint/")} == {"step-000002"}
    assert files["config.json"] == (folder / "config.json").read_bytes(), "the scale of the latents is pushed too"
    assert "latents_std" in json.loads(files["config.json"])
    assert "latents_mean` and" in files["README.md"].decode()


def test_a_push_to_a_branch_leaves_main_as_it_is(hub, trained_unet, tmp_path):
    flags = ["push", "--pipeline", trained_unet, "--repo-id", "user/corel", "--revision", "try-2"]
    pushed = tool(*flags, env=hub.env(tmp_path / "home"))
    assert "to user/corel, branch try-2, public if it is new:" in pushed.stdout
    assert hub.branches == ["try-2"]
    assert hub.revision == "try-2"


def test_a_pushed_vae_loads_by_itself(hub, trained_vae, tmp_path):
    flags = ["push", "--vae", trained_vae, "--repo-id", "user/vae", "--license", "cc-by-4.0", "--private"]
    assert not (trained_vae / "README.md").is_file()
    assert "README.md, the model card, will be written and pushed too" in tool_here(*flags, "--dry-run").stdout
    tool(*flags, env=hub.env(tmp_path / "home"))
    files = hub.repos["user/vae"]
    assert {"config.json", "diffusion_pytorch_model.safetensors", "README.md"} <= set(files)
    assert not [name for name in files if "checkpoint" in name or "run.json" in name or "photos" in name]
    card = files["README.md"].decode()
    assert ModelCard(card).data.license == "cc-by-4.0"
    assert 'AutoencoderKL.from_pretrained("user/vae")' in card
    assert "latents of 4 channels, with 4 pixels per" in " ".join(card.split())
    load = "import diffusers, sys; diffusers.AutoencoderKL.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"
    launch(sys.executable, "-c", load, "user/vae", tmp_path / "loaded", env=hub.env(tmp_path / "cache"))
    ours, loaded = (load_file(f / "diffusion_pytorch_model.safetensors") for f in (trained_vae, tmp_path / "loaded"))
    assert all((ours[name] == loaded[name]).all() for name in ours)


def test_pushed_photos_have_the_same_labels_captions_and_splits(hub, raw_photos, tmp_path):
    tool("push-dataset", "--data-dir", raw_photos, "--repo-id", "user/photos", env=hub.env(tmp_path / "home"))
    assert hub.private, "photos are private unless --public is given"
    for name, content in hub.repos["user/photos"].items():
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clone" / name).write_bytes(content)
    pushed, original = load_dataset(str(tmp_path / "clone")), load_photos(raw_photos)
    assert set(pushed) == set(original)
    for split, part in original.items():
        assert pushed[split].features["label"].names == part.features["label"].names
        for column in ("file_name", "label", "caption"):
            assert pushed[split][column][:] == part[column][:]
        assert np.array_equal(pushed[split][0]["image"], part[0]["image"])
    card = DatasetCard((tmp_path / "clone" / "README.md").read_text())
    assert 'load_dataset("user/photos")' in card.text


def test_the_best_pipeline_and_the_checkpoint_are_pushed_during_the_run(hub, unet_flags, tmp_path):
    """With --hub-strategy checkpoint. A longer run that goes on from the Hub equals one without a stop."""
    flags = [*unet_flags, "--lr-scheduler", "none", "--checkpoint-steps", 1, "--output-dir"]
    hub_flags = [
        "--push-to-hub",
        "--hub-model-id",
        "user/fresh",
        "--hub-strategy",
        "checkpoint",
        "--max-train-steps",
        2,
    ]
    env = {k: v for k, v in hub.env("").items() if k != "HF_HOME"}
    script("train_unet", *flags, tmp_path / "run", *hub_flags, env=env)
    checkpoint = {n: c for n, c in hub.repos["user/fresh"].items() if n.startswith("last-checkpoint/")}
    assert {name.split("/")[1] for name in checkpoint} == {"step-000002"}, "the checkpoint before is removed"
    for name, content in checkpoint.items():
        target = tmp_path / "clone" / "checkpoints" / name.removeprefix("last-checkpoint/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    run_here("train_unet", [*flags, tmp_path / "clone", "--resume", "latest", "--max-train-steps", 3])
    run_here("train_unet", [*flags, tmp_path / "whole", "--max-train-steps", 3])
    weights = [
        load_file(tmp_path / run / "checkpoints" / "step-000003" / "model.safetensors") for run in ("clone", "whole")
    ]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    assert (tmp_path / "clone" / "model_index.json").is_file()


def test_push_to_hub_without_a_token_is_refused_before_training(unet_flags, tmp_path, monkeypatch):
    monkeypatch.setattr("corel_diffusers.hub.upload.get_token", lambda: None)
    with pytest.raises(UserError, match="no token for the Hub"):
        run_here(
            "train_unet", [*unet_flags, "--output-dir", tmp_path / "out", "--push-to-hub", "--hub-model-id", "user/x"]
        )
    assert not (tmp_path / "out").exists()


def test_a_dry_run_lists_the_files_without_network(trained_unet, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))
    listed = tool_here("push", "--pipeline", trained_unet, "--repo-id", "user/x", "--dry-run")
    assert "would push" in listed.stdout
    assert "unet/diffusion_pytorch_model.safetensors" in listed.stdout
    assert "will be written and pushed too" not in listed.stdout


def test_errors_of_push_are_one_line(hub, trained_unet, trained_vae, tmp_path):
    unreachable = hub.env(tmp_path / "h") | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    to_hub = ["--repo-id", "user/x", "--pipeline", trained_unet]
    for flags, env, expected in (
        (["--repo-id", "nothing", "--pipeline", trained_unet], None, "--repo-id nothing: give user/name"),
        (["--pipeline", trained_unet], None, "error: --repo-id STR is missing: Id of the repository on the Hub:"),
        (["--repo-id", "user/x", "--pipeline", trained_vae], None, "holds a single model: give a VAE as --vae"),
        (["--repo-id", "user/x", "--vae", trained_unet], None, "holds a pipeline: give it as --pipeline"),
        (to_hub, hub.env(tmp_path / "h", token=""), "no token for the Hub"),
        (to_hub, hub.env(tmp_path / "h", token="hf_wrong"), "the Hub cannot be used with this token"),
        (to_hub, unreachable, "or check the connection"),
    ):
        command = ["push", *flags]
        refused = tool(*command, env=env, check=False) if env else tool_here(*command, check=False)
        assert refused.returncode == 2, refused.stderr
        assert expected in refused.stderr.splitlines()[-1]
        assert "Traceback" not in refused.stderr


def test_the_card_has_the_measured_numbers_and_a_card_of_the_user_is_kept(trained_unet, trained_vae, tmp_path):
    card = ModelCard.load(trained_unet / "README.md")
    assert card.data.library_name == "diffusers"
    assert "python train_vae.py" in card.text
    assert "python train_unet.py" in card.text
    assert "| VAE reconstruction, PSNR |" in card.text
    assert str(trained_vae.parent) not in card.text, "the card has no paths of the user's machine"
    copy = tmp_path / "copy"
    shutil.copytree(trained_unet, copy, ignore=shutil.ignore_patterns("checkpoints"))
    (copy / "README.md").write_text("my own card")
    write_card(copy)
    assert (copy / "README.md").read_text() == "my own card"
    (copy / "README.md").write_text(WRITTEN_BY)
    write_card(copy)
    assert "## Use" in (copy / "README.md").read_text()


def test_the_card_has_the_results_for_the_page_of_the_model(trained_unet, raw_photos, tmp_path):
    """The reference is evaluation.json. Names are shown as text: a class cannot add HTML to the page."""
    folder = tmp_path / "pipeline"
    shutil.copytree(trained_unet, folder, ignore=shutil.ignore_patterns("checkpoints"))
    index = json.loads((folder / "model_index.json").read_text())
    index["class_names"]["0"] = "<b>sea</b>"
    (folder / "model_index.json").write_text(json.dumps(index))
    values = {"kid_e3": 31.25, "kid_e3_low": 30.0, "kid_e3_high": 33.0, "fd": 2.5, "n": [300, 50],
              "precision": 0.5, "recall": 0.5}  # fmt: skip
    evaluation = {
        **weights_digests(folder), "features": "efficientnet-lite0", "held_out": "test",
        "generation": values, "reconstruction": values, "size_px": [32, 32],
        "copies": {"pictures": {"pixels": 0.01, "features": 0.02}, "n": {"pictures": 300}},
    }  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    write_card(folder, license_id="mit")
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit"
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["kid"].metric_value == 31.25
    assert results["copies"].metric_value == 0.01
    assert results["fd"].dataset_split == "test"
    assert "300 samples, 50 photos, efficientnet-lite0" in results["fd"].metric_name
    assert "&lt;b&gt;sea&lt;/b&gt;" in card.text


def test_a_card_without_an_evaluation_does_not_hash_the_weights(trained_unet, tmp_path, monkeypatch):
    """The card is written at each checkpoint, and hashing the weights takes time."""
    folder = tmp_path / "pipeline"
    shutil.copytree(trained_unet, folder, ignore=shutil.ignore_patterns("checkpoints"))
    monkeypatch.setattr(cards, "weights_digests", lambda folder: pytest.fail("the weights were hashed"))
    write_card(folder)
