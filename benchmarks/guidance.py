"""How strong should guidance be, and up to which gauge should a run save its best model?

python benchmarks/guidance.py --run diffusion_models --data-dir photos --scales 1.5 2 2.5 --until 0.6 1

The script measures the pipeline that a run of train_unet.py has saved as best, and then the averaged weights in each of
its checkpoints (`--keep-checkpoints 0` keeps all of them). Each one is measured with the guide model that it would be
saved with. The script measures the KID against the validation photos and the copies of training photos, for each
guidance scale. Guidance acts from zero noise up to each of the noise levels of --until. 300 samples say little about
copies, because 1 % is three samples. The script prints a table. It uses a GPU if there is one.
"""

import argparse
import json
from itertools import product
from pathlib import Path

import torch
from common import machine_name
from safetensors.torch import load_file

from corel_diffusers.config.commands import Generate
from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.pixels import cache_pixels
from corel_diffusers.evaluation.evaluate import labels_to_draw
from corel_diffusers.evaluation.features import as_array, extract, load_network, photo_features
from corel_diffusers.evaluation.judge import stratified_rows
from corel_diffusers.evaluation.kid import kernel_distance
from corel_diffusers.evaluation.memorization import CopyFinder
from corel_diffusers.evaluation.reconstruction import vae_rendering
from corel_diffusers.files import best_record, read_metrics
from corel_diffusers.sampling.pipelines import load_pipeline, pick_device, sample_size_px
from corel_diffusers.sampling.samplers import AUTO, build_sampler
from corel_diffusers.sampling.samples import sample_images
from corel_diffusers.training.checkpoints import find_checkpoints, step_of
from corel_diffusers.training.gauge import lowest_gauge
from corel_diffusers.training.guide import Guide


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the --output-dir of train_unet.py")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.5, 2.0, 2.5, 3.0])
    parser.add_argument(
        "--until",
        type=float,
        nargs="+",
        default=[0.6, 1.0],
        help="noise levels above which guidance is off; 1 is pure noise",
    )
    parser.add_argument("--num-images", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=15, help="steps of the sampler")
    parser.add_argument(
        "--only-published",
        action="store_true",
        help="measure only the pipeline that was saved as best, not the checkpoints",
    )
    parser.add_argument(
        "--without-guide", action="store_true", help="use guidance by the class in place of the guide model"
    )
    args = parser.parse_args()
    device = pick_device("auto")
    pipe, network = load_pipeline(args.run, device), load_network("efficientnet-lite0", device)
    pipe.scheduler = build_sampler(AUTO, pipe.scheduler)
    photos, pixels = cache_pixels(load_photos(args.data_dir), sample_size_px(pipe))
    real_features, photo_labels = (
        photo_features(network, pixels["validation"]),
        torch.tensor(photos["validation"]["label"][:]),
    )
    labels, like_photos = labels_to_draw(
        pipe, photos["train"].features["label"].names, photo_labels[stratified_rows(photo_labels, args.num_images)]
    )
    finder = CopyFinder.of(pixels["train"], vae_rendering(pipe.vae, pixels["train"]), device)
    metrics = read_metrics(args.run / "metrics.jsonl")
    guide_finder = Guide(args.run, pipe.unet, metrics[0]["images_seen"] // metrics[0]["step"])

    lines = []
    for checkpoint in [None, *([] if args.only_published else find_checkpoints(args.run))]:
        step = step_of(checkpoint) if checkpoint else best_record(metrics)["step"]
        record = min(metrics, key=lambda record: abs(record["step"] - step))
        minimum_gauge = lowest_gauge([earlier for earlier in metrics if earlier["step"] <= record["step"]])
        if checkpoint:
            averages = load_file(checkpoint / "ema.safetensors")
            for index, (_, weight) in enumerate(pipe.unet.named_parameters()):
                weight.data.copy_(averages[str(index)])
        guide_model = None if args.without_guide else guide_finder.of(step)
        pipe.register_modules(guide=guide_model and guide_model.to(device))
        for scale, until in product(args.scales, args.until):
            sampling_args = Generate(
                num_images=args.num_images, batch_size=50, guidance_scale=scale, mixed_precision="no"
            )
            sampling_args.guidance_interval = (0.0, until)
            samples = as_array(sample_images(pipe, sampling_args, labels, 0, num_inference_steps=args.steps))
            features, copies = extract(network, samples), finder.shares(*finder.search(samples))
            result = {
                "step": step,
                "published": checkpoint is None,
                "images_seen": record["images_seen"],
                "gauge": record["gauge"] / minimum_gauge,
            }
            result |= {
                "guide": guide_model is not None,
                "scale": scale,
                "until": until,
                "kid_e3": 1e3 * kernel_distance(features, real_features, labels_a=like_photos, labels_b=photo_labels),
                "copies": copies,
            }
            print(json.dumps(result), flush=True)
            cells = (
                f"{result['images_seen']:,}{'' if checkpoint else ', saved as best'} "
                f"| {100 * result['gauge'] - 100:.1f} %"
            )
            cells += f" | {'guide model' if guide_model else 'class'}, {scale:g} up to {until:g}"
            lines.append(f"| {cells} | {result['kid_e3']:.1f} | {copies['pixels']:.1%}, {copies['features']:.1%} |")
    print(f"{args.num_images} samples each, {machine_name()}\n")
    print(
        "| images seen | gauge above its minimum | guidance by | KID x1000 | copies in pixels, in features |\n"
        "|---|---|---|---|---|"
    )
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
