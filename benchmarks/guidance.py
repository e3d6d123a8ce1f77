"""How strong should guidance be, and until when should a run be published?

python benchmarks/guidance.py --run diffusion_models --data-dir photos --scales 1.5 2 2.5 --until 0.6 1 --num-images 2000

The pipeline that a run of train_unet.py has published, then the averages that it has left (all of them with `--keep-checkpoints 0`),
each with the guide that it would be published with: KID against the validation photos, and copies of training photos, at
each strength, from no noise up to each noise level. 300 pictures say little of copies: 1 % is three of them. Prints a table; on a GPU
where there is one.
"""

import argparse
import json
import sys
from itertools import product
from pathlib import Path

import torch
from common import ROOT, machine
from safetensors.torch import load_file

sys.path.insert(0, str(ROOT))
from corel_diffusers.checkpoints import find_checkpoints, step_of
from corel_diffusers.cli import Generate
from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.transforms import cache_pixels
from corel_diffusers.evaluation.evaluate import labels_to_draw, picture_size_px, render
from corel_diffusers.evaluation.features import as_array, extract, load_network, photo_features
from corel_diffusers.evaluation.memorization import CopyFinder
from corel_diffusers.evaluation.metrics import kernel_distance
from corel_diffusers.files import best_record, read_metrics
from corel_diffusers.generate import AUTO, build_sampler, load_pipeline, pick_device, sample_pictures
from corel_diffusers.guide import Guide
from train_unet import healthy_gauge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the --output-dir of train_unet.py")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.5, 2.0, 2.5, 3.0])
    parser.add_argument("--until", type=float, nargs="+", default=[0.6, 1.0], help="noise levels, 1 pure noise, above which nothing guides")
    parser.add_argument("--num-images", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=15, help="of the sampler")
    parser.add_argument("--only-published", action="store_true", help="leave the checkpoints out")
    parser.add_argument("--without-guide", action="store_true", help="guidance by the class")
    args = parser.parse_args()
    device = pick_device("auto")
    pipe, network = load_pipeline(args.run, device), load_network("efficientnet-lite0", device)
    pipe.scheduler = build_sampler(AUTO, pipe.scheduler)
    photos, pixels = cache_pixels(load_photos(args.data_dir), picture_size_px(pipe))
    real, photo_labels = photo_features(network, pixels["validation"]), torch.tensor(photos["validation"]["label"][:])
    labels, like_photos = labels_to_draw(pipe, photos["train"].features["label"].names, photo_labels, args.num_images)
    finder = CopyFinder.of(pixels["train"], render(pipe.vae, pixels["train"]), device)
    metrics = read_metrics(args.run / "metrics.jsonl")
    guide = Guide(args.run, pipe.unet, metrics[0]["images_seen"] // metrics[0]["step"])

    lines = []
    for checkpoint in [None, *([] if args.only_published else find_checkpoints(args.run))]:
        step = step_of(checkpoint) if checkpoint else best_record(metrics)["step"]
        record = min(metrics, key=lambda record: abs(record["step"] - step))
        lowest = healthy_gauge([before for before in metrics if before["step"] <= record["step"]])
        if checkpoint:
            averages = load_file(checkpoint / "ema.safetensors")
            for place, (_, weight) in enumerate(pipe.unet.named_parameters()):
                weight.data.copy_(averages[str(place)])
        early = None if args.without_guide else guide.of(step)
        pipe.register_modules(guide=early and early.to(device))
        for scale, until in product(args.scales, args.until):
            drawing = Generate(num_images=args.num_images, batch_size=50, guidance_scale=scale, mixed_precision="no")
            drawing.guidance_interval = (0.0, until)
            pictures = as_array(sample_pictures(pipe, drawing, labels, 0, num_inference_steps=args.steps))
            features, copies = extract(network, pictures), finder.shares(*finder.search(pictures))
            found = {"step": step, "published": checkpoint is None, "images_seen": record["images_seen"], "gauge": record["gauge"] / lowest}
            found |= {
                "guide": early is not None,
                "scale": scale,
                "until": until,
                "kid_e3": 1e3 * kernel_distance(features, real, labels_a=like_photos, labels_b=photo_labels),
                "copies": copies,
            }
            print(json.dumps(found), flush=True)
            cells = f"{found['images_seen']:,}{'' if checkpoint else ', as published'} | {100 * found['gauge'] - 100:.1f} %"
            cells += f" | {'early self' if early else 'class'}, {scale:g} up to {until:g}"
            lines.append(f"| {cells} | {found['kid_e3']:.1f} | {copies['pixels']:.1%}, {copies['features']:.1%} |")
    print(f"{args.num_images} pictures each, {machine()}\n")
    print("| pictures seen | gauge over its lowest | guidance by | KID x1000 | copies in pixels, in features |\n|---|---|---|---|---|")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
