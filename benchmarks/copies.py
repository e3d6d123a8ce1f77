"""Which features tell a copy of a photo from a picture that is merely plain?

python benchmarks/copies.py --pipelines diffusion_models --data-dir photos --num-images 1000

For each pipeline and each way to make a vector of EfficientNet-Lite0's last feature map: the share of training photos that are found
again after a change (each mirrored, and rendered by the VAE), of held-out photos that pass for copies (false alarms), and of the
pipeline's own pictures. The last way, which `corel-diffusers evaluate` takes, knows the photos' corners. The ratio is calibrated as it
does. The last column is the pipeline's share where the ratio is one that finds as many of the changed photos as the mean of the whole
map does. Where the pipeline copies nothing in pixels, the better features are those that find more changed photos and fewer pictures.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import machine
from torch.nn import functional as F

from corel_diffusers.cli import Generate
from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.transforms import cache_pixels
from corel_diffusers.evaluation.evaluate import picture_size_px, reconstruct, render
from corel_diffusers.evaluation.features import as_array, efficientnet_map
from corel_diffusers.evaluation.memorization import PIXEL_RATIO, CopyFinder, calibrated_ratio, cropped, distances, resize, two_nearest
from corel_diffusers.generate import AUTO, DEFAULT_STEPS, build_sampler, load_pipeline, pick_device, pick_labels, sample_pictures


def places(feature_map: torch.Tensor, side: int, unit: bool) -> torch.Tensor:
    """(B, C, 7, 7) -> means in side x side places, (B, side * side * C), each scaled to unit length or as it is."""
    means = F.adaptive_avg_pool2d(feature_map.float(), side)
    return (F.normalize(means, dim=1) if unit else means).flatten(1)


WAYS = {
    f"{'the whole' if side == 1 else f'{side} x {side} places'}{', unit length' if unit else ''}": partial(places, side=side, unit=unit)
    for side in (1, 2, 3, 5)
    for unit in (False, True)
}
CHANGES = {
    "cropped to 0.93": lambda photo: cropped(photo, (0.93, 0.04, 0.02)),
    "0.81": lambda photo: cropped(photo, (0.81, 0.11, 0.06)),
    "0.68": lambda photo: cropped(photo, (0.68, 0.19, 0.1)),
    "blurred": lambda photo: resize(resize(photo[None], photo.shape[0] * 3 // 8), photo.shape[0])[0],
    "paler": lambda photo: (photo * 0.85 + 12).astype(np.uint8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipelines", type=Path, nargs="+", required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--max-train-samples", type=int, help="as it was given to train_unet.py")
    args = parser.parse_args()
    device = pick_device("auto")
    network = efficientnet_map(device)

    @torch.no_grad()
    def map_of(pictures: np.ndarray) -> torch.Tensor:
        parts = torch.from_numpy(np.ascontiguousarray(pictures)).split(32)
        return torch.cat([network(part).half().cpu() for part in parts])

    print(f"{args.num_images} pictures of each pipeline, {machine()}")
    for folder in args.pipelines:
        pipe = load_pipeline(folder, device)
        pipe.scheduler = build_sampler(AUTO, pipe.scheduler)
        pixels = cache_pixels(load_photos(args.data_dir, max_train_samples=args.max_train_samples), picture_size_px(pipe))[1]
        photos, rendered = pixels["train"].values[:], render(pipe.vae, pixels["train"])
        finder = CopyFinder.of(pixels["train"], rendered, device)
        drawing = Generate(num_images=args.num_images, batch_size=50, mixed_precision="no")
        made = as_array(sample_pictures(pipe, drawing, pick_labels(pipe, (), args.num_images), 0, num_inference_steps=DEFAULT_STEPS[AUTO]))
        changed = {name: reconstruct(pipe.vae, np.stack([change(photo)[:, ::-1] for photo in photos])) for name, change in CHANGES.items()}
        held_out = np.concatenate([render(pipe.vae, part).values[:] for split, part in pixels.items() if split != "train"])
        maps = {name: map_of(pictures) for name, pictures in (changed | {"held-out photos": held_out, "its pictures": made}).items()}
        photo_maps = [map_of(views) for views in (rendered.values[:], rendered.values[:][:, :, ::-1])]

        in_pixels = finder.in_pixels(made).share_below(PIXEL_RATIO)
        print(f"\n{folder}: {in_pixels:.1%} of its pictures are copies in pixels\n")
        print(f"| vector | ratio | {' | '.join(maps)} | as many found |\n|---|---|{'---|' * len(maps)}---|")
        found_by_mean = None
        ways = [(name, way, [way(photo_map) for photo_map in photo_maps]) for name, way in WAYS.items()]
        ways.append(("3 x 3 places, unit length, of the corners as well", WAYS["3 x 3 places, unit length"], finder.features))
        for name, way, views in ways:
            ratio = calibrated_ratio(views, finder.groups)
            near = {what: two_nearest(distances(way(values), views), finder.groups) for what, values in maps.items()}
            all_changed = torch.cat([near[what].ratio for what in CHANGES])
            found_by_mean = found_by_mean or float((all_changed < ratio).double().mean())
            equal = near["its pictures"].share_below(float(torch.quantile(all_changed, found_by_mean)))
            shares = [near[what].share_below(ratio) for what in maps]
            print(f"| {name} | {ratio:.2f} | {' | '.join(f'{share:.1%}' for share in (*shares, equal))} |", flush=True)


if __name__ == "__main__":
    main()
