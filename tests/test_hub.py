"""Push -> from_pretrained with the real client, over HTTP, against a small stand-in of the Hub."""

import shutil
import sys

import pytest
from conftest import launch, run_here, script, tool
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from corel_diffusers import hub as hub_module
from corel_diffusers.files import UserError
from corel_diffusers.generate import build_sampler
from corel_diffusers.hub import WRITTEN_BY, write_card

LOAD = """
import sys
sys.modules["corel_diffusers"] = None  # importing it fails
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
for name, model in pipe.components.items():
    if hasattr(model, "parameters"):
        model.save_pretrained(f"{sys.argv[2]}/{name}")
pipe(1, 0, num_inference_steps=2)
"""


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def check_loaded(hub, repo_id, source, folder, parts=("unet", "vae")):
    """Loads from the Hub with an empty cache in a process without this package: the same weights, bit by bit."""
    launch(sys.executable, "-c", LOAD, repo_id, folder / "loaded", env=hub.env(folder / "empty-cache") | {"PYTHONPATH": ""})
    for part in parts:
        ours, theirs = (load_file(root / part / "diffusion_pytorch_model.safetensors") for root in (source, folder / "loaded"))
        assert ours.keys() == theirs.keys()
        assert all((ours[name] == theirs[name]).all() for name in ours)


def test_push_and_load_again(hub, trained_unet, tmp_path):
    guided = tmp_path / "guided"
    shutil.copytree(trained_unet, guided)
    pipe = DiffusionPipeline.from_pretrained(guided, trust_remote_code=True)
    pipe.register_modules(guide=UNet2DModel.from_config(pipe.unet.config))
    pipe.save_pretrained(guided)
    done = tool("push", "--pipeline", guided, "--repo-id", "user/corel", "--private", env=hub.env(tmp_path / "home"))
    assert "pushed: " in done.stdout
    assert hub.private
    files = hub.repos["user/corel"]
    assert {"model_index.json", "pipeline.py", "README.md", "grid.png", "unet/diffusion_pytorch_model.safetensors"} <= set(files)
    assert not [name for name in files if "checkpoint" in name or "samples" in name or "metrics" in name or "run.json" in name]
    assert TOKEN not in done.stdout + done.stderr
    assert not any(TOKEN.encode() in content for content in files.values())
    assert 'from_pretrained("user/corel"' in files["README.md"].decode()
    assert "pipe.guide = None" in files["README.md"].decode()
    check_loaded(hub, "user/corel", guided, tmp_path, parts=("unet", "guide", "vae"))
    generated = tool(
        "generate", "--pipeline", "user/corel", "--trust-remote-code", "--base-dir", tmp_path, "--num-images", 1, "--ddim-steps", 2,
        env=hub.env(tmp_path / "another-cache"),
    )  # fmt: skip
    assert "grid: " in generated.stdout
    hub.private = False
    refused = tool("push", "--pipeline", guided, "--repo-id", "user/corel", "--private", env=hub.env(tmp_path / "home"), check=False)
    assert refused.returncode == 2
    assert "it exists and is public" in refused.stderr
    pipe.guide = None
    pipe.save_pretrained(guided)
    listed = tool("push", "--pipeline", guided, "--repo-id", "user/corel", "--dry-run").stdout
    assert "unet/" in listed
    assert "guide/" not in listed, "what is left of it is no part of the pipeline"


def test_train_unet_pushes_when_it_ends(hub, unet_flags, tmp_path):
    folder = tmp_path / "run"
    flags = ["--output-dir", folder, "--max-train-steps", 2, "--push-to-hub", "--hub-model-id", "user/fresh"]
    script("train_unet", *unet_flags, *flags, env={k: v for k, v in hub.env("").items() if k != "HF_HOME"})
    check_loaded(hub, "user/fresh", folder, tmp_path)


def test_training_for_the_hub_without_a_token_is_refused_before_it_begins(unet_flags, tmp_path, monkeypatch):
    monkeypatch.setattr("corel_diffusers.hub.get_token", lambda: None)
    with pytest.raises(UserError, match="no token for the Hub"):
        run_here("train_unet", [*unet_flags, "--output-dir", tmp_path / "out", "--push-to-hub", "--hub-model-id", "user/x"])
    assert not (tmp_path / "out").exists()


def test_a_dry_run_touches_no_network_and_lists_what_would_go(trained_unet):
    done = tool("push", "--pipeline", trained_unet, "--repo-id", "user/x", "--dry-run", env={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert "would push" in done.stdout
    assert "unet/diffusion_pytorch_model.safetensors" in done.stdout


def test_refusals_are_one_line(hub, trained_unet, tmp_path):
    for flags, env, expected in (
        (["--repo-id", "nothing", "--pipeline", trained_unet], {}, "--repo-id nothing: give user/name"),
        (["--repo-id", "user/x", "--pipeline", trained_unet], hub.env(tmp_path / "h", token=""), "no token for the Hub"),
        (["--repo-id", "user/x", "--pipeline", trained_unet], hub.env(tmp_path / "h", token="hf_wrong"), "was not pushed"),
        (
            ["--repo-id", "user/x", "--pipeline", trained_unet],
            hub.env(tmp_path / "h") | {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "was not pushed",
        ),
    ):
        done = tool("push", *flags, env=env, check=False)
        assert done.returncode == 2, done.stderr
        assert expected in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_the_card_says_what_was_measured_and_keeps_a_users_edits(trained_unet, trained_vae, tmp_path):
    card = ModelCard.load(trained_unet / "README.md")
    assert card.data.library_name == "diffusers"
    assert "python train_vae.py" in card.text
    assert "python train_unet.py" in card.text
    assert "| VAE reconstruction, PSNR |" in card.text
    assert str(trained_vae.parent) not in card.text, "no folder of the user's machine"
    copy = tmp_path / "copy"
    shutil.copytree(trained_unet, copy, ignore=shutil.ignore_patterns("checkpoints"))
    assert "from_config(pipe.scheduler.config)\n" in card.text
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    scheduler.save_pretrained(copy / "scheduler")
    write_card(copy)
    assert "from_config(pipe.scheduler.config, lambda_min_clipped=-5.1)\n" in (copy / "README.md").read_text()
    assert build_sampler("dpm-solver++", scheduler).config.lambda_min_clipped == -5.1
    (copy / "README.md").write_text("my own card")
    write_card(copy)
    assert (copy / "README.md").read_text() == "my own card"
    (copy / "README.md").write_text(WRITTEN_BY)
    write_card(copy)
    assert "## Use" in (copy / "README.md").read_text()


def test_no_weights_are_read_for_a_card_without_an_evaluation(trained_unet, tmp_path, monkeypatch):
    """The card is written at each checkpoint."""
    folder = tmp_path / "pipeline"
    shutil.copytree(trained_unet, folder, ignore=shutil.ignore_patterns("checkpoints"))
    monkeypatch.setattr(hub_module, "pipeline_digest", lambda folder: pytest.fail("the weights were hashed"))
    write_card(folder)
