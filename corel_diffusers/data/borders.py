"""Find the black film borders of a photo."""

import numpy as np

DARK = 32  # a row or column is black film if its 90th percentile of brightness (0 to 255) is below this
JUMP = 24  # black film ends with at least this jump in brightness; the brightness of a dark photo increases gradually
MAX_BORDER = 0.1  # maximum border, as a fraction of the side; a wider black area is part of the photo


def black_borders(image: np.ndarray) -> tuple[int, int, int, int]:
    """Return the widths in px of the black film borders of an RGB image (H, W, 3): left, top, right, bottom.

    A border consists of dark rows or columns at the edge (DARK). It ends with a jump in brightness (JUMP) within
    MAX_BORDER of the side. A dark sky or table is wider, or its brightness increases gradually, so it is not a border.
    The widths include the soft edge of the film.
    """
    brightness = image.max(axis=2).astype(np.float32)

    def border(lines: np.ndarray) -> int:
        levels = np.percentile(lines[: int(MAX_BORDER * len(lines)) + 6], 90, axis=1)
        dark = int(np.argmax(levels >= DARK)) if (levels >= DARK).any() else len(levels)
        if dark < 2 or dark > MAX_BORDER * len(lines):
            return 0
        jump = levels[min(dark + 3, len(levels) - 1)] - levels[dark - 1]
        return dark + 2 if jump >= JUMP else 0

    rows, columns = brightness, brightness.T
    return border(columns), border(rows), border(columns[::-1]), border(rows[::-1])
