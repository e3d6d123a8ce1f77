"""What a run's own measurements say to do next: history -> one line for each trouble, none where all is well."""

import math

from corel_diffusers.arguments import TrainingArguments, VAEArguments

COLLAPSED_DB = 1.5  # reconstructions this little above the mean picture carry nothing of the photo
HIGH_KL_PER_VALUE = 8.0  # nats a latent value: the posterior is then some e^-8 wide, a point and not a distribution


def on_loss(history: list[dict], name: str, args: TrainingArguments) -> list[str]:
    """A training loss that has not fallen by a twentieth from the first tenth of the validations to the last."""
    values = [record[name] for record in history if name in record]
    if len(values) < 5:
        return []
    tenth = max(1, len(values) // 10)
    first, last = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
    if last < 0.95 * first:
        return []
    rate = args.learning_rate
    if last > first:
        way_out = f"the learning rate is too high: try --lr {rate / 2:.1g} (was {rate:g})"
    else:
        lengths = {
            "--max-train-minutes": args.max_train_minutes,
            "--max-train-steps": args.max_train_steps,
            "--epochs": history[-1]["epoch"],
        }
        flag, length = next((flag, length) for flag, length in lengths.items() if length)
        way_out = f"train longer ({flag} {2 * length:.9g}) or try --lr {rate * 2:.1g} (was {rate:g})"
    return [f"the loss is not falling ({name} {first:.4g} at first, {last:.4g} at last): {way_out}"]


def on_kl(history: list[dict], args: VAEArguments, latent_shape: tuple[int, ...], mean_picture_psnr: float) -> list[str]:
    """A KL that has collapsed the posterior, has run away, or is not at its target.

    latent_shape: (C, h, w). mean_picture_psnr: PSNR of the mean training photo on the held-out ones.
    """
    latent_values = math.prod(latent_shape)
    last = next((record for record in reversed(history) if "val_kl" in record), None)
    if last is None:
        return []
    kl, psnr, weight = last["val_kl"], last["val_psnr"], last["kl_weight"]
    measured = (
        f"KL {kl:.0f} nats a photo at weight {weight:.2g}, held-out PSNR {psnr:.1f} dB, the mean picture's is {mean_picture_psnr:.1f}"
    )
    if psnr < mean_picture_psnr + COLLAPSED_DB and kl < 0.1 * latent_values:
        flag = (
            f"raise --kl-target (was {args.kl_target:g})"
            if args.kl_target
            else f"lower --kl-weight (was {args.kl_weight:g}; 0.4 over the number of pixels suits most)"
        )
        return [f"the KL is too low, the latents carry almost nothing ({measured}): {flag}"]
    if args.kl_target and not 0.8 < kl / args.kl_target < 1.25:
        return [f"the KL is not at its target of {args.kl_target:g} ({measured}): train longer, or set --kl-target nearer to {kl:.0f}"]
    if kl > HIGH_KL_PER_VALUE * latent_values:
        way_out = f"raise --kl-weight (was {args.kl_weight:g}) or set --kl-target {4 * latent_values}"
        return [f"the KL is too high, {kl / latent_values:.1f} nats a latent value ({measured}): {way_out}"]
    return []


def on_copies(results: dict) -> list[str]:
    """An evaluation's pictures of which more count as copies than of held-out photos, which cannot be any: more than chance would bring.

    Fisher's exact test of the two counts, one-sided. Both measures together are wrong in 5 % of evaluations or fewer.
    """
    from scipy.stats import fisher_exact  # a second, which no training script needs to start

    copies, lines = results["copies"], []
    for measure in ("pixels", "features") if "held_out" in copies else ():
        kinds = ("pictures", "held_out")
        counts = [round(copies[kind][measure] * copies["n"][kind]) for kind in kinds]
        table = [counts, [copies["n"][kind] - count for kind, count in zip(kinds, counts, strict=True)]]
        if fisher_exact(table, alternative="greater").pvalue < 0.05 / 2:
            lighter = results.get("guide") and results["guidance_scale"] > 1.5
            way_out = "--guidance-scale 1.5 makes fewer" if lighter else "train for less time, on more photos or with more --views"
            shares = (f"{copies[kind][measure]:.1%}" for kind in kinds)
            lines.append(f"{next(shares)} of the pictures count as copies in {measure}, of held-out photos {next(shares)}: {way_out}")
    return lines
