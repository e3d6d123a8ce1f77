"""Which features distinguish a copy of a photo from a sample that is only plain?

python benchmarks/copies.py --pipelines diffusion_models --data-dir photos --num-images 1000

There are several ways to turn EfficientNet-Lite0's last feature map into a vector. For each pipeline and each of these
vectors, the table lists three kinds of fractions:

- training photos that are found again after a change; each is also mirrored and rendered by the VAE,
- held-out photos that are counted as copies (false alarms),
- samples of the pipeline that are counted as copies.

The last vector also covers the corners of the photos. `corel-diffusers evaluate` uses it. The ratio is calibrated as
`evaluate` calibrates it. For the last column ("as many found"), the ratio is set so that each vector finds as many
changed photos as the mean of the whole map finds. The column lists the fraction of samples that are then counted as
copies. If a pipeline has no copies in pixels, the better features find more changed photos and fewer samples.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import machine_name
from torch.nn import functional as F

from corel_diffusers.config.commands import Generate
from corel_diffusers.data.photos import load_photos
from corel_diffusers.data.pixels import cache_pixels
from corel_diffusers.evaluation.features import as_array, efficientnet_map
from corel_diffusers.evaluation.memorization import PIXEL_RATIO, CopyFinder, calibrated_ratio, two_nearest
from corel_diffusers.evaluation.photo_crops import crop_image, distances, resize
from corel_diffusers.evaluation.reconstruction import reconstruct, vae_rendering
from corel_diffusers.sampling.pipelines import load_pipeline, pick_device, sample_size_px
from corel_diffusers.sampling.samplers import AUTO, SAMPLERS, build_sampler
from corel_diffusers.sampling.samples import labels_for_images, sample_images


def cell_means(feature_map: torch.Tensor, side: int, unit_length: bool) -> torch.Tensor:
    """Average a feature map over side x side cells: (B, C, 7, 7) -> (B, side * side * C).

    With `unit_length`, the mean of each cell is scaled to unit length.
    """
    means = F.adaptive_avg_pool2d(feature_map.float(), side)
    return (F.normalize(means, dim=1) if unit_length else means).flatten(1)


VECTORS = {
    f"{'the whole' if side == 1 else f'{side} x {side} places'}{', unit length' if unit_length else ''}": partial(
        cell_means, side=side, unit_length=unit_length
    )
    for side in (1, 2, 3, 5)
    for unit_length in (False, True)
}
CHANGES = {
    "cropped to 0.93": lambda photo: crop_image(photo, (0.93, 0.04, 0.02)),
    "0.81": lambda photo: crop_image(photo, (0.81, 0.11, 0.06)),
    "0.68": lambda photo: crop_image(photo, (0.68, 0.19, 0.1)),
    "blurred": lambda photo: resize(resize(photo[None], photo.shape[0] * 3 // 8), photo.shape[0])[0],
    "paler": lambda photo: (photo * 0.85 + 12).astype(np.uint8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipelines", type=Path, nargs="+", required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--max-train-samples", type=int, help="use the value that train_unet.py was run with")
    args = parser.parse_args()
    device = pick_device("auto")
    network = efficientnet_map(device)

    @torch.no_grad()
    def feature_maps(images: np.ndarray) -> torch.Tensor:
        parts = torch.from_numpy(np.ascontiguousarray(images)).split(32)
        return torch.cat([network(part).half().cpu() for part in parts])

    print(f"{args.num_images} samples of each pipeline, {machine_name()}")
    for folder in args.pipelines:
        pipe = load_pipeline(folder, device)
        pipe.scheduler = build_sampler(AUTO, pipe.scheduler)
        pixels = cache_pixels(
            load_photos(args.data_dir, max_train_samples=args.max_train_samples), sample_size_px(pipe)
        )[1]
        photos, rendered = pixels["train"].values[:], vae_rendering(pipe.vae, pixels["train"])
        copy_finder = CopyFinder.of(pixels["train"], rendered, device)
        sampling_args = Generate(num_images=args.num_images, batch_size=50, mixed_precision="no")
        samples = as_array(
            sample_images(
                pipe,
                sampling_args,
                labels_for_images(pipe, (), args.num_images),
                0,
                num_inference_steps=SAMPLERS[AUTO].default_steps,
            )
        )
        changed = {
            name: reconstruct(pipe.vae, np.stack([apply_change(photo)[:, ::-1] for photo in photos]))
            for name, apply_change in CHANGES.items()
        }
        held_out = np.concatenate(
            [vae_rendering(pipe.vae, part).values[:] for split, part in pixels.items() if split != "train"]
        )
        maps_by_name = {
            name: feature_maps(images)
            for name, images in (changed | {"held-out photos": held_out, "its samples": samples}).items()
        }
        photo_feature_maps = [feature_maps(images) for images in (rendered.values[:], rendered.values[:][:, :, ::-1])]

        pixel_copies = copy_finder.in_pixels(samples).share_below(PIXEL_RATIO)
        print(f"\n{folder}: {pixel_copies:.1%} of its samples are copies in pixels\n")
        print(
            f"| vector | ratio | {' | '.join(maps_by_name)} | as many found |\n"
            f"|---|---|{'---|' * len(maps_by_name)}---|"
        )
        found_by_mean = None
        vectors = [
            (name, vectorize, [vectorize(photo_map) for photo_map in photo_feature_maps])
            for name, vectorize in VECTORS.items()
        ]
        vectors.append(
            (
                "3 x 3 places, unit length, of the corners as well",
                VECTORS["3 x 3 places, unit length"],
                copy_finder.features,
            )
        )
        for name, vectorize, photo_vectors in vectors:
            ratio = calibrated_ratio(photo_vectors, copy_finder.groups)
            nearest = {
                image_set: two_nearest(distances(vectorize(values), photo_vectors), copy_finder.groups)
                for image_set, values in maps_by_name.items()
            }
            all_changed = torch.cat([nearest[image_set].ratio for image_set in CHANGES])
            found_by_mean = found_by_mean or float((all_changed < ratio).double().mean())
            sample_fraction = nearest["its samples"].share_below(float(torch.quantile(all_changed, found_by_mean)))
            fractions = [nearest[image_set].share_below(ratio) for image_set in maps_by_name]
            print(
                f"| {name} | {ratio:.2f} "
                f"| {' | '.join(f'{fraction:.1%}' for fraction in (*fractions, sample_fraction))} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
