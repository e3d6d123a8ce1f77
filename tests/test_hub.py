"""Push and load with the real Hub client, over HTTP, from a local server that stands in for the Hub."""

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
from corel_diffusers.hub import WRITTEN_BY, write_card
from corel_diffusers.sampling.samplers import build_sampler

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
    listed = tool("push", "--pipeline", guided, "--repo-id", "user/corel", "--dry-run").stdout
    assert "unet/" in listed
    assert "guide/" not in listed, "the folder that is left is not part of the pipeline"


def test_train_unet_pushes_when_training_ends(hub, unet_flags, tmp_path):
    folder = tmp_path / "run"
    flags = ["--output-dir", folder, "--max-train-steps", 2, "--push-to-hub", "--hub-model-id", "user/fresh"]
    script("train_unet", *unet_flags, *flags, env={k: v for k, v in hub.env("").items() if k != "HF_HOME"})
    check_loaded(hub, "user/fresh", folder, tmp_path)
    assert hub.private, "a repository is private unless --hub-public is given"


def test_a_push_to_a_branch_leaves_main_as_it_is(hub, trained_unet, tmp_path):
    flags = ["push", "--pipeline", trained_unet, "--repo-id", "user/corel", "--revision", "try-2"]
    pushed = tool(*flags, env=hub.env(tmp_path / "home"))
    assert "to user/corel, branch try-2, public if it is new:" in pushed.stdout
    assert hub.branches == ["try-2"]
    assert hub.revision == "try-2"


def test_push_to_hub_without_a_token_is_refused_before_training(unet_flags, tmp_path, monkeypatch):
    monkeypatch.setattr("corel_diffusers.hub.get_token", lambda: None)
    with pytest.raises(UserError, match="no token for the Hub"):
        run_here(
            "train_unet", [*unet_flags, "--output-dir", tmp_path / "out", "--push-to-hub", "--hub-model-id", "user/x"]
        )
    assert not (tmp_path / "out").exists()


def test_a_dry_run_lists_the_files_without_network(trained_unet):
    listed = tool(
        "push",
        "--pipeline",
        trained_unet,
        "--repo-id",
        "user/x",
        "--dry-run",
        env={"HF_ENDPOINT": "http://127.0.0.1:9"},
    )
    assert "would push" in listed.stdout
    assert "unet/diffusion_pytorch_model.safetensors" in listed.stdout


def test_errors_of_push_are_one_line(hub, trained_unet, tmp_path):
    for flags, env, expected in (
        (["--repo-id", "nothing", "--pipeline", trained_unet], {}, "--repo-id nothing: give user/name"),
        (
            ["--repo-id", "user/x", "--pipeline", trained_unet],
            hub.env(tmp_path / "h", token=""),
            "no token for the Hub",
        ),
        (
            ["--repo-id", "user/x", "--pipeline", trained_unet],
            hub.env(tmp_path / "h", token="hf_wrong"),
            "was not pushed",
        ),
        (
            ["--repo-id", "user/x", "--pipeline", trained_unet],
            hub.env(tmp_path / "h") | {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "was not pushed",
        ),
    ):
        refused = tool("push", *flags, env=env, check=False)
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


def test_a_card_without_an_evaluation_does_not_hash_the_weights(trained_unet, tmp_path, monkeypatch):
    """The card is written at each checkpoint, and hashing the weights takes time."""
    folder = tmp_path / "pipeline"
    shutil.copytree(trained_unet, folder, ignore=shutil.ignore_patterns("checkpoints"))
    monkeypatch.setattr(hub_module, "pipeline_digest", lambda folder: pytest.fail("the weights were hashed"))
    write_card(folder)
