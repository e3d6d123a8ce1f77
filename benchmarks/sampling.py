"""Which sampler reaches the lowest KID in a given time, and how much faster is it than the plain loop?

python benchmarks/sampling.py --pipeline diffusion_models --data-dir photos --num-images 300

The script runs each sampler with each number of steps. It measures the KID against the validation photos and the
seconds of sampling. The plain loop runs 50 steps of DDIM in float32. It needs two forward passes per step, one with and
one without the class, like the examples of diffusers. Writes sampling.json, sampling.md and sampling.png.
"""

import argparse
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from common import machine_name
from diffusers import DDIMScheduler, DiffusionPipeline
from matplotlib.ticker import LogLocator, NullFormatter

from corel_diffusers.config.checks import SCENES
from corel_diffusers.config.commands import Generate
from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.pixels import cache_pixels
from corel_diffusers.evaluation.evaluate import labels_to_draw
from corel_diffusers.evaluation.features import as_array, extract, load_network, photo_features
from corel_diffusers.evaluation.judge import stratified_rows
from corel_diffusers.evaluation.metrics import compare
from corel_diffusers.evaluation.report import with_interval
from corel_diffusers.files import write_json, write_text
from corel_diffusers.models.configs import downsample_factor
from corel_diffusers.runtime.precision import resolve_precision
from corel_diffusers.sampling.pipelines import load_pipeline, sample_size_px
from corel_diffusers.sampling.samplers import SAMPLERS, build_sampler
from corel_diffusers.sampling.samples import sample_images

PLAIN = "plain loop, ddim"


@torch.no_grad()
def plain_loop(pipe: DiffusionPipeline, labels: list[int] | None, args: argparse.Namespace, steps: int) -> list:
    """Sample with DDIM, in float32.

    Each of the two predictions of guidance takes a separate forward pass. The VAE decodes the full batch at once. The
    samples are those that the pipeline draws when guidance acts at all noise levels.
    """
    scheduler, images = DDIMScheduler.from_config(pipe.scheduler.config), []
    scheduler.set_timesteps(steps)
    shape = pipe.unet.config.in_channels, *(side // downsample_factor(pipe.vae) for side in sample_size_px(pipe))
    for indices in torch.arange(args.num_images).split(args.batch_size):
        noise = [torch.randn(1, *shape, generator=torch.Generator().manual_seed(int(index))) for index in indices]
        latents, batch_labels = torch.cat(noise), torch.tensor([labels[index] for index in indices]) if labels else None
        for timestep in scheduler.timesteps:
            model_pred = pipe.unet(latents, timestep, batch_labels).sample
            if guide := getattr(pipe, "guide", None):
                guide_pred = guide(latents, timestep, batch_labels).sample
            elif labels:
                guide_pred = pipe.unet(latents, timestep, torch.full_like(batch_labels, pipe.null_label)).sample
            else:
                guide_pred = model_pred
            model_pred = guide_pred + args.guidance_scale * (model_pred - guide_pred)
            latents = scheduler.step(model_pred, timestep, latents).prev_sample
        images += pipe.decode(latents, "pil")
    return images


def draw_plot(rows: list[dict], path: Path) -> None:
    """Plot KID over seconds, with one line per sampler."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name in dict.fromkeys(row["sampler"] for row in rows):
        sampler_rows = sorted((row for row in rows if row["sampler"] == name), key=lambda row: row["seconds"])
        axes.plot(
            [row["seconds"] for row in sampler_rows], [row["kid_e3"] for row in sampler_rows], marker="o", label=name
        )
        for row in sampler_rows:
            axes.annotate(
                row["steps"], (row["seconds"], row["kid_e3"]), fontsize=7, xytext=(3, 3), textcoords="offset points"
            )
    axes.set(xscale="log", xlabel=f"seconds for {rows[0]['n'][0]} samples", ylabel="KID x1000 against held-out photos")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True)
    parser.add_argument("--data-dir", required=True, help='a folder of photos, or "scenes"')
    parser.add_argument("--output-dir", type=Path, default=Path("sampling"))
    parser.add_argument("--num-images", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=2.5)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8, 10, 15, 20, 25, 50, 100])
    parser.add_argument("--samplers", nargs="+", default=tuple(SAMPLERS), choices=tuple(SAMPLERS))
    args = parser.parse_args()
    device, precision = torch.device("cpu"), resolve_precision("auto", "cpu")
    pipe, network = load_pipeline(args.pipeline, device), load_network("efficientnet-lite0", device)
    photos, pixels = cache_pixels(
        load_photos(SCENES if args.data_dir == SCENES else Path(args.data_dir)), sample_size_px(pipe)
    )
    real_features, photo_labels = (
        photo_features(network, pixels["validation"]),
        torch.tensor(photos["validation"]["label"][:]),
    )
    class_names = photos["train"].features["label"].names
    training_scheduler, (labels, like_photos) = (
        pipe.scheduler,
        labels_to_draw(pipe, class_names, photo_labels[stratified_rows(photo_labels, args.num_images)]),
    )
    shared = {"num_images": args.num_images, "batch_size": args.batch_size, "guidance_scale": args.guidance_scale}
    sampling_args = Generate(**shared, mixed_precision=precision)

    rows = []
    runs = [(PLAIN, 50), *((name, steps) for steps in args.steps for name in args.samplers)]
    plain_loop(pipe, labels, args, 2)  # warm-up: the first call is slow, and the plain loop is timed first
    for name, steps in runs:
        start = time.monotonic()
        if name == PLAIN:
            samples = plain_loop(pipe, labels, args, steps)
        else:
            pipe.scheduler = build_sampler(name, training_scheduler)
            samples = list(sample_images(pipe, sampling_args, labels, 0, num_inference_steps=steps))
        seconds = time.monotonic() - start
        scores = compare(
            extract(network, as_array(samples)), real_features, labels_a=like_photos, labels_b=photo_labels
        )
        rows.append({"sampler": name, "steps": steps, "seconds": seconds} | scores)
        lines = ["| sampler | steps | seconds | times as fast | KID x1000 [95 %] | FD |", "|---|---|---|---|---|---|"]
        for row in sorted(rows, key=lambda row: row["seconds"]):
            cells = row["sampler"], row["steps"], f"{row['seconds']:.1f}", f"{rows[0]['seconds'] / row['seconds']:.1f}"
            lines.append(f"| {' | '.join(map(str, cells))} | {with_interval(row)} | {row['fd']:.0f} |")
        text = (
            f"{args.num_images} samples, guidance {args.guidance_scale:g}, {machine_name('cpu')}\n\n"
            + "\n".join(lines)
            + "\n"
        )
        write_text(args.output_dir / "sampling.md", text)
        write_json(args.output_dir / "sampling.json", {"machine": machine_name("cpu"), "rows": rows})
        draw_plot(rows, args.output_dir / "sampling.png")
    print(text)


if __name__ == "__main__":
    main()
