"""The data set `scenes`: images that the package draws itself, so that everything runs without data and network.

There are six classes. Each class has one clear shape, and its scenes vary in light, colour and layout. So a look at a
grid of samples shows what a model has learned. The same seed draws the same images on every machine with the same
versions of pillow and numpy.
"""

import io

import numpy as np
from datasets import Dataset
from PIL import Image, ImageDraw

CLASS_NAMES = ("sunset at sea", "snowy mountain", "pine forest", "city at night", "desert", "hot-air balloon")
SIDE_PX = 128
_DRAWN_PX = 2 * SIDE_PX  # scenes are drawn at twice the size and reduced: this smooths the edges


def draw_scenes(count: int = 1200, seed: int = 0) -> Dataset:
    """Draw `count` scenes of SIDE_PX x SIDE_PX pixels. The classes alternate.

    The images are PNG bytes. The Dataset has the same columns as the photos of any other source.
    """
    from corel_diffusers.data.columns import dataset_of
    from corel_diffusers.data.folder_contents import default_caption

    labels = [index % len(CLASS_NAMES) for index in range(count)]
    images = []
    for index, label in enumerate(labels):
        buffer = io.BytesIO()
        draw_scene(label, np.random.default_rng([seed, index])).save(buffer, "PNG", compress_level=1)
        images.append({"path": None, "bytes": buffer.getvalue()})
    captions = [default_caption(CLASS_NAMES[label]) for label in labels]
    return dataset_of(images, labels, list(CLASS_NAMES), captions, [f"scene_{index:05d}.png" for index in range(count)])


def draw_scene(label: int, rng: np.random.Generator) -> Image.Image:
    """Draw one scene of the class `CLASS_NAMES[label]`, an RGB image."""
    painter = (_sunset, _mountain, _forest, _city, _desert, _balloon)[label]
    canvas = painter(rng).reduce(_DRAWN_PX // SIDE_PX)
    noisy = np.asarray(canvas, np.float32) * rng.uniform(0.88, 1.08) + rng.normal(0, 1.5, (SIDE_PX, SIDE_PX, 1))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def _gradient(top: tuple, bottom: tuple, power: float = 1.0) -> Image.Image:
    """Draw a sky: a vertical gradient from the colour `top` to the colour `bottom`."""
    fraction = np.linspace(0, 1, _DRAWN_PX)[:, None, None] ** power
    colours = np.array(top) * (1 - fraction) + np.array(bottom) * fraction
    return Image.fromarray(np.broadcast_to(colours, (_DRAWN_PX, _DRAWN_PX, 3)).astype(np.uint8))


def _vary(rng: np.random.Generator, colour: tuple, spread: int = 18) -> tuple:
    return tuple(int(c) for c in np.clip(np.array(colour) + rng.integers(-spread, spread + 1, 3), 0, 255))


def _shade(colour: tuple, factor: float) -> tuple:
    return tuple(int(min(255, c * factor)) for c in colour)


def _ridge(rng: np.random.Generator, level: float, height: float, bumps: int) -> list[tuple[float, float]]:
    """Return a polygon below a smooth ground line. `level` and `height` are fractions of the image side."""
    x = np.linspace(0, 1, 65)
    y = sum(rng.normal(0, 1 / k) * np.sin(2 * np.pi * (k * x / 2 + rng.random())) for k in range(1, bumps + 1))
    y = level - height * y / (np.abs(y).max() + 1e-6)
    return [(0, _DRAWN_PX), *zip(x * _DRAWN_PX, y * _DRAWN_PX, strict=True), (_DRAWN_PX, _DRAWN_PX)]


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: tuple) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _sunset(rng: np.random.Generator) -> Image.Image:
    side = _DRAWN_PX
    top, low = _vary(rng, [(70, 40, 110), (150, 50, 60), (40, 60, 130)][rng.integers(3)]), _vary(rng, (255, 165, 70))
    horizon = side * rng.uniform(0.5, 0.72)
    canvas = _gradient(top, low, rng.uniform(0.7, 1.4))
    draw = ImageDraw.Draw(canvas)
    x, radius = side * rng.uniform(0.22, 0.78), side * rng.uniform(0.08, 0.15)
    _disc(draw, x, horizon - radius * rng.uniform(-0.2, 1.6), radius, _vary(rng, (255, 235, 150), 12))
    sea = _shade(top, 0.65)
    draw.rectangle((0, horizon, side, side), fill=sea)
    for y in np.arange(horizon + 3, side, 9):
        width = radius * (1.1 - 0.55 * (y - horizon) / (side - horizon)) * rng.uniform(0.6, 1.3)
        draw.line((x - width, y, x + width, y), fill=_vary(rng, (250, 190, 100), 14), width=4)
    return canvas


def _mountain(rng: np.random.Generator) -> Image.Image:
    side = _DRAWN_PX
    canvas = _gradient(_vary(rng, (70, 130, 210)), _vary(rng, (190, 220, 245)))
    draw = ImageDraw.Draw(canvas)
    rock = _vary(rng, (95, 95, 115))
    for place in sorted(rng.uniform(0.2, 0.8, rng.integers(1, 4)), key=lambda p: abs(p - 0.5), reverse=True):
        peak, base = side * rng.uniform(0.15, 0.4), side * 0.92
        x, half = side * place, side * rng.uniform(0.32, 0.5)
        draw.polygon([(x - half, base), (x, peak), (x + half, base)], fill=rock)
        draw.polygon([(x, peak), (x + half, base), (x + half * 0.15, base)], fill=_shade(rock, 0.75))
        cap = rng.uniform(0.35, 0.5)
        low, snow = peak + cap * (base - peak), half * cap
        edge = [(x + snow, low), (x + snow * 0.4, low - 12), (x, low + 14), (x - snow * 0.4, low - 10), (x - snow, low)]
        draw.polygon([(x, peak), *edge], fill=(245, 248, 255))
    draw.polygon(_ridge(rng, rng.uniform(0.78, 0.86), 0.04, 3), fill=_vary(rng, (70, 130, 70)))
    return canvas


def _forest(rng: np.random.Generator) -> Image.Image:
    side = _DRAWN_PX
    canvas = _gradient(_vary(rng, (165, 200, 215)), _vary(rng, (225, 235, 225)))
    draw = ImageDraw.Draw(canvas)
    draw.polygon(_ridge(rng, rng.uniform(0.6, 0.7), 0.05, 3), fill=_vary(rng, (120, 160, 90)))
    green = _vary(rng, (30, 95, 50), 14)
    for base in np.sort(rng.uniform(0.66, 0.95, rng.integers(5, 10))):
        x, base_y = side * rng.uniform(0.04, 0.96), side * base
        tall = side * rng.uniform(0.35, 0.5) * base
        wide = tall * rng.uniform(0.22, 0.3)
        draw.rectangle((x - wide * 0.14, base_y - 4, x + wide * 0.14, base_y + tall * 0.1), fill=(85, 60, 40))
        tone = _shade(green, rng.uniform(0.75, 1.3))
        for tier in range(3):
            low, high = base_y - tall * 0.27 * tier, base_y - tall * (0.45 + 0.275 * tier)
            draw.polygon(
                [(x - wide * (1 - 0.25 * tier), low), (x, high), (x + wide * (1 - 0.25 * tier), low)], fill=tone
            )
    return canvas


def _city(rng: np.random.Generator) -> Image.Image:
    side = _DRAWN_PX
    canvas = _gradient(_vary(rng, (8, 10, 40), 8), _vary(rng, (45, 40, 95)))
    draw = ImageDraw.Draw(canvas)
    _disc(
        draw,
        side * rng.uniform(0.12, 0.88),
        side * rng.uniform(0.1, 0.22),
        side * rng.uniform(0.05, 0.08),
        (240, 240, 215),
    )
    x = -rng.uniform(0, 20)
    while x < side:
        width = side * rng.uniform(0.13, 0.22)
        top = side * rng.uniform(0.3, 0.65)
        draw.rectangle((x, top, x + width, side), fill=_vary(rng, (22, 22, 38), 8))
        for window_y in np.arange(top + 10, side - 8, 22):
            for window_x in np.arange(x + 7, x + width - 12, 18):
                if rng.random() < 0.6:
                    draw.rectangle(
                        (window_x, window_y, window_x + 9, window_y + 11), fill=_vary(rng, (250, 215, 110), 14)
                    )
        x += width + rng.uniform(2, 10)
    return canvas


def _desert(rng: np.random.Generator) -> Image.Image:
    side = _DRAWN_PX
    canvas = _gradient(_vary(rng, (90, 170, 225)), _vary(rng, (240, 225, 190)))
    draw = ImageDraw.Draw(canvas)
    _disc(draw, side * rng.uniform(0.1, 0.9), side * rng.uniform(0.1, 0.25), side * 0.06, (255, 245, 200))
    sand = _vary(rng, (225, 170, 100), 14)
    for level, factor in ((0.58, 0.85), (0.68, 1.0), (0.84, 1.12)):
        draw.polygon(_ridge(rng, level + rng.uniform(-0.03, 0.03), 0.06, 2), fill=_shade(sand, factor))
    for _ in range(rng.integers(1, 3)):
        x, base = side * rng.uniform(0.15, 0.85), side * rng.uniform(0.75, 0.92)
        tall, thick = side * rng.uniform(0.28, 0.42), side * 0.03
        green = _vary(rng, (45, 115, 65), 12)
        draw.rounded_rectangle((x - thick, base - tall, x + thick, base), thick, fill=green)
        for direction in (-1, 1):
            arm_x, arm_y = x + direction * thick * 3.2, base - tall * rng.uniform(0.4, 0.55)
            draw.rectangle((min(x, arm_x), arm_y - thick * 0.7, max(x, arm_x), arm_y + thick * 0.7), fill=green)
            left = arm_x - thick * 0.7
            draw.rounded_rectangle(
                (left, arm_y - tall * 0.3, left + thick * 1.4, arm_y + thick * 0.7), thick * 0.7, fill=green
            )
    return canvas


def _balloon(rng: np.random.Generator) -> Image.Image:
    side = _DRAWN_PX
    canvas = _gradient(_vary(rng, (110, 170, 235)), _vary(rng, (215, 235, 250)))
    draw = ImageDraw.Draw(canvas)
    draw.polygon(_ridge(rng, rng.uniform(0.82, 0.9), 0.04, 2), fill=_vary(rng, (105, 165, 75)))
    palette = [(220, 50, 50), (245, 190, 40), (150, 60, 170), (240, 120, 40), (40, 90, 190)]
    first, second = rng.choice(len(palette), 2, replace=False)
    x, y, radius = side * rng.uniform(0.3, 0.7), side * rng.uniform(0.28, 0.42), side * rng.uniform(0.18, 0.25)
    draw.polygon(
        [(x - radius * 0.93, y + radius * 0.4), (x + radius * 0.93, y + radius * 0.4), (x, y + radius * 1.7)],
        fill=palette[first],
    )
    for stripe, fraction in enumerate((1.0, 0.72, 0.36)):
        colour = palette[first] if stripe % 2 == 0 else palette[second]
        draw.ellipse((x - radius * fraction, y - radius, x + radius * fraction, y + radius), fill=colour)
    basket = radius * 0.16
    draw.rectangle((x - basket, y + radius * 1.6, x + basket, y + radius * 1.6 + basket * 1.6), fill=(110, 70, 40))
    return canvas
