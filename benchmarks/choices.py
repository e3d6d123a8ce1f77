"""Where do the presets come from? Train each alternative and the preset for equal minutes and compare them.

python benchmarks/choices.py vae --data-dir photos --minutes 3 --image-size 64
python benchmarks/choices.py unet --data-dir photos --minutes 5 --vae-checkpoint vae_models
python benchmarks/choices.py vae --data-dir photos --minutes 3 --image-size 128 --config base --together 4

The trainings run one after the other. If one training leaves a GPU idle, run several at a time with --together. Run
nothing else at the same time. The scores are measured on the validation photos: the presets are chosen on them, so that
the test photos are only used for reported results. The VAE's last column is the KL in nats per latent value: the less
information the latents carry, the sooner a UNet learns them. The UNet's losses can only be compared between rows that
have the same prediction type, noise schedule and VAE.
"""

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import torch
from common import QUIET, ROOT, evaluate, machine_name, run_script
from diffusers import AutoencoderKL, UNet2DModel

from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.pixels import cache_pixels
from corel_diffusers.evaluation.features import load_network, photo_features
from corel_diffusers.evaluation.reconstruction import reconstruct, reconstruction_scores
from corel_diffusers.evaluation.report import with_interval
from corel_diffusers.files import best_record, read_metrics, write_json, write_text
from corel_diffusers.models.configs import load_config, parameter_count

Choices = dict[str, tuple[dict, list]]  # name -> (changes to the preset, additional flags)

F8 = {"block_out_channels": [16, 32, 64, 128]}
TINY_VAE: Choices = {
    "tiny: f4, 4 channels, [16, 32, 64]": ({}, []),
    "f4, 8 channels": ({"latent_channels": 8}, []),
    "f4, 16 channels": ({"latent_channels": 16}, []),
    "f8, 4 channels, [16, 32, 64, 128]": (F8, []),
    "f8, 8 channels": (F8 | {"latent_channels": 8}, []),
    "f8, 16 channels": (F8 | {"latent_channels": 16}, []),
    "f4, 8 norm groups, attention": ({"norm_num_groups": 8, "mid_block_add_attention": True}, []),
    "f4, [32, 64, 128]": ({"block_out_channels": [32, 64, 128]}, []),
    "f4, [16, 64, 128]": ({"block_out_channels": [16, 64, 128]}, []),
    "AdamW": ({}, ["--optimizer", "adamw"]),
    "KL weight 5e-5": ({}, ["--kl-weight", 5e-5]),
    "KL weight 1e-6": ({}, ["--kl-weight", 1e-6]),
    "KL weight 2e-4": ({}, ["--kl-weight", 2e-4]),
    "whole photos only": ({}, ["--crop-chance", 0]),
    "crops only": ({}, ["--crop-chance", 1]),
    "no perceptual term": ({}, ["--no-perceptual"]),
    "adversarial term": ({}, ["--adversarial-weight", 0.2]),
    "twice the learning rate": ({}, ["--lr", 2e-4]),
    "batch 4": ({}, ["--batch-size", 4]),
    "batch 8": ({}, ["--batch-size", 8]),
}
BASE_F8 = {"block_out_channels": [32, 64, 128, 128]}
BASE_VAE: Choices = {
    "base: f4, 4 channels, [32, 64, 128], 4 norm groups": ({}, []),
    "f4, 8 channels": ({"latent_channels": 8}, []),
    "f8, 4 channels, [32, 64, 128, 128]": (BASE_F8, []),
    "f8, 8 channels": (BASE_F8 | {"latent_channels": 8}, []),
    "f8, 16 channels": (BASE_F8 | {"latent_channels": 16}, []),
    "f8, 8 channels, [64, 128, 256, 256]": (
        BASE_F8 | {"latent_channels": 8, "block_out_channels": [64, 128, 256, 256]},
        [],
    ),
    "f8, 8 channels, 2 norm groups, no attention": (
        BASE_F8 | {"latent_channels": 8, "norm_num_groups": 2, "mid_block_add_attention": False},
        [],
    ),
    "f8, 8 channels, 32 norm groups": (BASE_F8 | {"latent_channels": 8, "norm_num_groups": 32}, []),
}
WIDER = {"block_out_channels": [64, 128, 256, 256], "layers_per_block": 2}
LARGE_VAE: Choices = {
    "large: f8, 8 channels, [32, 64, 128, 128], 1 layer, 4 norm groups": ({}, []),
    "[64, 128, 256, 256], 2 layers, 32 norm groups": (WIDER | {"norm_num_groups": 32}, []),
    "[64, 128, 256, 256], 2 layers, 8 norm groups": (WIDER | {"norm_num_groups": 8}, []),
    "[64, 128, 256, 256], 1 layer, 8 norm groups": (WIDER | {"norm_num_groups": 8, "layers_per_block": 1}, []),
    "[128, 256, 512, 512], 2 layers, 32 norm groups": (
        {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32},
        [],
    ),
}
TINY_UNET: Choices = {
    "tiny: [32, 64, 128], batch 16": ({}, []),
    "batch 8": ({}, ["--batch-size", 8]),
    "batch 32": ({}, ["--batch-size", 32]),
    "[64, 128, 192]": ({"block_out_channels": [64, 128, 192], "norm_num_groups": 32}, []),
    "no attention at half size": (
        {
            "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
        },
        [],
    ),
    "time as a shift only": ({"resnet_time_scale_shift": "default"}, []),
    "no alignment": ({}, ["--align-weight", 0]),
    "alignment 1": ({}, ["--align-weight", 1]),
    "no min-SNR": ({}, ["--min-snr-gamma", 0]),
    "log-normal timesteps": ({}, ["--min-snr-gamma", 0, "--timesteps", "log-normal"]),
    "predicts noise": ({}, ["--prediction-type", "epsilon"]),
    "cosine schedule": ({}, ["--schedule", "cosine"]),
    "zero terminal SNR": ({}, ["--zero-terminal-snr"]),
    "half the learning rate": ({}, ["--lr", 1e-3]),
    "twice the learning rate": ({}, ["--lr", 4e-3]),
    "8 changed views of each photo": ({}, ["--views", 8]),
}
BASE_UNET: Choices = {
    "base: [128, 192, 256]": ({}, []),
    "[64, 128, 256]": ({"block_out_channels": [64, 128, 256]}, []),
    "[192, 256, 384]": ({"block_out_channels": [192, 256, 384]}, []),
    "one layer a stage": ({"layers_per_block": 1}, []),
    "time as a scale and shift": ({"resnet_time_scale_shift": "scale_shift"}, []),
    "a fifth of the learning rate": ({}, ["--lr", 1e-4]),
    "batch 32": ({}, ["--batch-size", 32]),
}
LARGE_UNET: Choices = {
    "large: [192, 384, 768]": ({}, []),
    "[128, 256, 512]": ({"block_out_channels": [128, 256, 512]}, []),
    "base's [128, 192, 256]": ({"block_out_channels": [128, 192, 256], "attention_head_dim": 32}, []),
    "one layer a stage": ({"layers_per_block": 1}, []),
    "a fifth of the learning rate": ({}, ["--lr", 1e-4]),
}
CHOICES = {
    ("vae", "tiny"): (TINY_VAE, ["--batch-size", 2, "--lr", 1e-4]),
    ("vae", "base"): (BASE_VAE, ["--batch-size", 16, "--lr", 1e-4]),
    ("vae", "large"): (LARGE_VAE, ["--batch-size", 16, "--lr", 1e-4]),
    ("unet", "tiny"): (TINY_UNET, ["--batch-size", 16, "--lr", 2e-3]),
    ("unet", "base"): (BASE_UNET, ["--batch-size", 16, "--lr", 5e-4, "--views", 0]),
    ("unet", "large"): (LARGE_UNET, ["--batch-size", 32, "--lr", 5e-4, "--views", 0]),
}
SCORE_COLUMNS = {
    "vae": ["PSNR (dB)", "SSIM", "perceptual", "KID x1000 [95 %]", "nats per value"],
    "unet": ["held-out loss", "KID x1000 [95 %]", "precision", "recall"],
}


def judge_vae(args: argparse.Namespace) -> Callable[[Path], tuple[dict, str]]:
    """Return a function from a VAE's folder to its scores and its cells of the table."""
    photos, pixels = cache_pixels(load_photos(args.data_dir), (args.image_size, args.image_size))
    network = load_network("efficientnet-lite0", torch.device("cpu"))
    real_features, labels = (
        photo_features(network, pixels["validation"]),
        torch.tensor(photos["validation"]["label"][:]),
    )

    def judge(folder: Path) -> tuple[dict, str]:
        vae = AutoencoderKL.from_pretrained(folder).eval()
        held_out = pixels["validation"].values
        scores = reconstruction_scores(reconstruct(vae, held_out), held_out, network, real_features, labels)
        values_per_photo = (
            vae.config.latent_channels * (args.image_size // 2 ** (len(vae.config.block_out_channels) - 1)) ** 2
        )
        nats_per_value = best_record(read_metrics(folder / "metrics.jsonl"))["val_kl"] / values_per_photo
        cells = [
            parameter_count(vae).split()[0],
            f"{scores['psnr_db']:.2f}",
            f"{scores['ssim']:.3f}",
            f"{scores['perceptual']:.3f}",
        ]
        return scores | {"nats_per_value": nats_per_value}, " | ".join(
            [*cells, with_interval(scores), f"{nats_per_value:.2f}"]
        )

    return judge


def judge_unet(args: argparse.Namespace) -> Callable[[Path], tuple[dict, str]]:
    """Return a function from a pipeline's folder to its scores and its cells of the table."""

    def judge(folder: Path) -> tuple[dict, str]:
        results = evaluate(args.data_dir, folder, args.num_images, "validation", "--pipeline", folder)
        scores = results["generation"]
        loss = min(record["val_loss"] for record in read_metrics(folder / "metrics.jsonl"))
        size = parameter_count(UNet2DModel.from_pretrained(folder / "unet")).split()[0]
        cells = [size, f"{loss:.4f}", with_interval(scores), f"{scores['precision']:.2f}", f"{scores['recall']:.2f}"]
        return scores | {"val_loss": loss}, " | ".join(cells)

    return judge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["vae", "unet"])
    parser.add_argument("--config", default="tiny", choices=["tiny", "base", "large"])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, default=Path("choices"))
    parser.add_argument("--vae-checkpoint", type=Path, help="required for unet: the --output-dir of train_vae.py")
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--num-images", type=int, default=150, help="samples per pipeline, for unet")
    parser.add_argument(
        "--only", nargs="+", type=int, help="indices of the choices to train, from 0; the other rows are kept"
    )
    parser.add_argument("--together", type=int, default=1, help="how many trainings run at the same time")
    args = parser.parse_args()
    args.data_dir, args.output_dir = args.data_dir.resolve(), args.output_dir.resolve()
    if (args.model == "unet") != bool(args.vae_checkpoint):
        parser.error("--vae-checkpoint: unet needs it, and vae does not accept it")
    if (args.model, args.config) not in CHOICES:
        parser.error(f"--config {args.config}: there are no choices for the {args.model} of this preset")

    choices, preset_flags = CHOICES[args.model, args.config]
    judge = {"vae": judge_vae, "unet": judge_unet}[args.model](args)
    columns = ["choice", "photos/s", "M parameters", *SCORE_COLUMNS[args.model]]
    title = f"{args.minutes:g} minutes each at {args.image_size} px, {args.together} at a time, {machine_name()}"
    json_file, rows = args.output_dir / f"{args.model}.json", {}
    if args.only and json_file.is_file():  # keep the other rows
        rows = json.loads(json_file.read_text())["rows"]

    def train_and_judge(index: int) -> dict:
        """Train one choice and judge it. Return its row of the table and its scores."""
        name = list(choices)[index]
        changes, flags = choices[name]
        folder, config = (args.output_dir / f"{args.model}-{index:02d}{suffix}" for suffix in ("", ".json"))
        write_json(config, load_config(args.model, args.config) | changes)
        shared = [
            "--data-dir",
            args.data_dir,
            "--output-dir",
            folder,
            "--config",
            config,
            "--max-train-minutes",
            args.minutes,
            *QUIET,
        ]
        shared += (
            ["--vae-checkpoint", args.vae_checkpoint.resolve()]
            if args.vae_checkpoint
            else ["--image-size", args.image_size]
        )
        run_script(ROOT / f"train_{args.model}.py", *shared, *preset_flags, *flags)
        last = read_metrics(folder / "metrics.jsonl")[-1]
        speed = last["images_seen"] / last["seconds"]
        with judge_lock:
            scores, cells = judge(folder)
        return {"row": f"| {name} | {speed:.0f} | {cells} |"} | scores | {"photos_per_second": speed}

    judge_lock, indices = Lock(), args.only or range(len(choices))
    with ThreadPoolExecutor(args.together) as pool:
        for index, row in zip(indices, pool.map(train_and_judge, indices), strict=True):
            rows[list(choices)[index]] = row
            lines = [
                f"| {' | '.join(columns)} |",
                "|---" * len(columns) + "|",
                *(rows[choice]["row"] for choice in choices if choice in rows),
            ]
            write_json(json_file, {"title": title, "rows": rows})
            write_text(args.output_dir / f"{args.model}.md", "\n".join([title, "", *lines]) + "\n")
    print((args.output_dir / f"{args.model}.md").read_text())


if __name__ == "__main__":
    main()
