"""dSprites, rendered anew from its published factors: the pixels are this file's, not copies of the published images.

White shapes on black, 64 x 64: 3 shapes (square, ellipse, heart), 6 scales (0.5 to 1), 40 orientations (0 to 2 pi),
32 x 32 positions; 737,280 images, numbered as published, y the fastest. Factors and labels are the published ones,
outlines and sizes are chosen here. The first and the last of the published orientations are the same angle, and a
small square looks alike at others too; of images that are alike, a draw keeps one. The tasks of VTAB proper come from
its processed folder; those here are like its dSpr-Loc and dSpr-Ori.
"""

from functools import cache

import numpy as np

from bench.paper.visual.data import Arrays, Task

SHAPES = ("square", "ellipse", "heart")
SIZES = (3, 6, 40, 32, 32)  # shape, scale, orientation, x, y
SCALES = np.linspace(0.5, 1, SIZES[1])
ORIENTATIONS = np.linspace(0, 2 * np.pi, SIZES[2])
SIDE = 64
CLASSES = 16
TEST_IN_VTAB = 73_728
NOTES = (
    "dSprites rendered anew from the published factors: not the published pixels",
    "like VTAB's task, not it: that comes from the processed folder",
)

# A step of position is one pixel, so an image is a canvas of 33 x 33, pasted at (x, y); no outline leaves it
CANVAS = SIDE - SIZES[3] + 1
# No edge of an upright square lies on the centre of a pixel, at any scale
HALF_SIDE, SEMI_AXES, HEART = 11.2, (14.7, 7.7), 12.1  # pixels, at scale 1
HEART_MIDDLE = 0.29  # where its area is centred, in its own coordinates


def sprite(shape: int, scale: float, angle: float) -> np.ndarray:
    """bool [33, 33]: the pixels whose centre is inside the shape about the middle, turned by `angle` (radians)."""
    x = np.arange(CANVAS) - CANVAS // 2
    x, y = x[None, :], x[:, None]
    u = (np.cos(angle) * x + np.sin(angle) * y) / scale
    v = (np.cos(angle) * y - np.sin(angle) * x) / scale
    if SHAPES[shape] == "square":
        return (np.abs(u) <= HALF_SIDE) & (np.abs(v) <= HALF_SIDE)
    if SHAPES[shape] == "ellipse":
        return (u / SEMI_AXES[0]) ** 2 + (v / SEMI_AXES[1]) ** 2 <= 1
    u, v = u / HEART, HEART_MIDDLE - v / HEART  # rows count downwards
    return (u**2 + v**2 - 1) ** 3 <= u**2 * v**3


@cache
def _sprites() -> np.ndarray:
    """uint8 [3, 6, 40, 33, 33]."""
    drawn = [[[sprite(s, k, a) for a in ORIENTATIONS] for k in SCALES] for s in range(len(SHAPES))]
    return np.array(drawn).astype(np.uint8) * 255


def factors(numbers: np.ndarray) -> np.ndarray:
    """[n, 5]: shape, scale, orientation, x and y, as places in their lists, of images by number."""
    return np.stack(np.unravel_index(numbers, SIZES), axis=1)


def render(chosen: np.ndarray) -> np.ndarray:
    """uint8 [n, 64, 64], 0 or 255, of factors [n, 5]."""
    shape, scale, orientation, x, y = np.asarray(chosen).T
    images = np.zeros((len(shape), SIDE, SIDE), np.uint8)
    steps = np.arange(CANVAS)
    rows, columns = (y[:, None] + steps)[:, :, None], (x[:, None] + steps)[:, None, :]
    images[np.arange(len(shape))[:, None, None], rows, columns] = _sprites()[shape, scale, orientation]
    return images


def location(chosen: np.ndarray) -> np.ndarray:
    """int64 [n]: 16 classes of 2 x positions each."""
    return chosen[:, 3] // (SIZES[3] // CLASSES)


def orientation(chosen: np.ndarray) -> np.ndarray:
    """int64 [n]: 16 classes of 2 or 3 orientations each, the whole part of label / (40 / 16)."""
    return np.floor(chosen[:, 2] / (SIZES[2] / CLASSES)).astype(np.int64)


LABELS = {"loc": location, "ori": orientation}


def _different(order: np.ndarray) -> np.ndarray:
    """`order`, numbers of images, without those whose pixels are those of an earlier one."""
    places = SIZES[3] * SIZES[4]
    alike = np.unique(_sprites().reshape(-1, CANVAS**2), axis=0, return_inverse=True)[1].reshape(-1)
    looks = alike[order // places] * places + order % places
    return order[np.sort(np.unique(looks, return_index=True)[1])]


def tasks(test: int = 10_000, seed: int = 0) -> dict[str, Task]:
    """ "loc" and "ori" over the same images: 800 train, 200 val, 1,000 trainval (both), `test` others (VTAB: 73,728).

    Drawn evenly from all images, as VTAB's are, so classes are not quite of one size. No two images are alike.
    """
    order = _different(np.random.default_rng(seed).permutation(int(np.prod(SIZES))))
    if not 1 <= test <= len(order) - 1000:
        raise ValueError(f"test is {test}, expected 1 to {len(order) - 1000}")
    cuts = {
        "train": slice(0, 800),
        "val": slice(800, 1000),
        "trainval": slice(0, 1000),
        "test": slice(1000, 1000 + test),
    }
    chosen = {part: factors(order[cut]) for part, cut in cuts.items()}
    pixels = {part: render(rows) for part, rows in chosen.items()}
    return {
        name: Task(
            name=f"dsprites_{name}",
            suite="small",
            classes=CLASSES,
            parts={part: Arrays(pixels[part], label(rows)) for part, rows in chosen.items()},
            style="vtab",
            final="trainval",
            notes=NOTES,
        )
        for name, label in LABELS.items()
    }
