"""Cluttered synthetic scenes with boxes, from a seed: the data set that comes with the package."""
import math

import numpy as np
from PIL import Image, ImageDraw

from tinydet.data import Example

CLASSES = ("cross", "disk", "ring", "square", "star", "triangle")
SMALLEST, LARGEST = 16, 84          # side of a shape in pixels: a factor of 5.25
TURN = 0.35                         # shapes are turned by up to 20 degrees either way
FINE = 3                            # shapes are drawn this much larger and averaged down: smooth edges


def scenes(count, seed, split="train"):
    """`count` scenes, a list of Example; scene i depends on (seed, split, i) alone; train, val and test share none.

    Images of 128 to 192 pixels a side: a shaded, textured background with lines, scribbles and half shapes that belong to no
    class, and 1 to 5 shapes of six classes, any colour, slightly turned, that may hide one another. Boxes enclose what is
    visible; shapes of which less than 60 % is visible are difficult, below 30 % they have no box.
    """
    code = [seed, *split.encode()]
    return [scene(f"{split}{i:05d}", np.random.default_rng([*code, i])) for i in range(count)]


def scene(name, rng):
    """One scene as an Example."""
    W, H = (int(v) for v in rng.integers(128, 193, 2))
    image = _background(W, H, rng)
    owner = np.full((H, W), -1)                                     # which shape is on top
    labels, areas = [], []
    for _ in range(rng.integers(1, 6)):
        side = SMALLEST * (LARGEST / SMALLEST) ** rng.random()
        label = int(rng.integers(len(CLASSES)))
        cx, cy = rng.uniform(0.3 * side, W - 0.3 * side), rng.uniform(0.3 * side, H - 0.3 * side)
        cover = _cover(shape(CLASSES[label], cx, cy, side, rng.uniform(-TURN, TURN)), W, H)
        covered = owner[cover > 0.5]
        if not len(covered) or any((covered == i).sum() > 0.5 * areas[i] for i in set(covered) - {-1}):
            continue                                                # it would hide another one
        _paint(image, cover, _colour_unlike(image, cover, rng), rng)
        owner[cover > 0.5] = len(labels)
        labels.append(label)
        areas.append(int((cover > 0.5).sum()))
    _clutter(image, rng, int(rng.integers(0, 3)), thickness=1)      # a few thin lines over everything
    image += rng.normal(0, rng.uniform(2, 6), image.shape)
    boxes, kept, difficult = [], [], []
    for i, label in enumerate(labels):
        ys, xs = np.nonzero(owner == i)
        if len(xs) < 0.3 * areas[i] or min(np.ptp(xs), np.ptp(ys)) < 5:
            continue
        boxes.append((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
        kept.append(label)
        difficult.append(len(xs) < 0.6 * areas[i])
    return Example(name, image.clip(0, 255).astype(np.uint8), (W, H), np.array(boxes, float).reshape(-1, 4),
                   np.array(kept, np.int64), np.array(difficult, bool))


def items(count, seed, split="train", side=40):
    """`count` grey images (side, side) of one shape each on black, a list of Example with the class as tag: for canvases.canvases.

    Image i depends on (seed, split, i) and side alone. Shapes are slightly turned, as in scenes.
    """
    made, none = [], (np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0, bool))
    for i in range(count):
        rng = np.random.default_rng([seed, *split.encode(), i])
        label, angle = int(rng.integers(len(CLASSES))), rng.uniform(-TURN, TURN)
        cover = _cover(shape(CLASSES[label], side / 2, side / 2, side * rng.uniform(0.6, 0.9), angle), side, side)
        made.append(Example(f"{split}{i:05d}", (255 * cover).astype(np.uint8), (side, side), *none, np.array([label])))
    return made


def shape(name, cx, cy, side, angle):
    """Polygons of a shape of about `side` pixels: a list of (points, filled); a hole is a polygon that is not filled."""
    def circle(radius):
        return [(radius * math.cos(t), radius * math.sin(t)) for t in np.linspace(0, 2 * math.pi, 60, endpoint=False)]

    def regular(radii):                                             # the first corner points up
        return [(r * math.sin(2 * math.pi * i / len(radii)), -r * math.cos(2 * math.pi * i / len(radii)))
                for i, r in enumerate(radii)]

    r, arm = side / 2, side / 6
    polygons = {
        "disk": [(circle(r), True)],
        "ring": [(circle(r), True), (circle(0.58 * r), False)],
        "square": [([(-0.8 * r, -0.8 * r), (0.8 * r, -0.8 * r), (0.8 * r, 0.8 * r), (-0.8 * r, 0.8 * r)], True)],
        "triangle": [(regular([1.1 * r] * 3), True)],
        "star": [(regular([1.1 * r, 0.45 * r] * 5), True)],
        "cross": [([(-r, -arm), (-arm, -arm), (-arm, -r), (arm, -r), (arm, -arm), (r, -arm), (r, arm), (arm, arm), (arm, r),
                    (-arm, r), (-arm, arm), (-r, arm)], True)],
        "half": [([(x, y) for x, y in circle(r) if y >= -1e-9], True)],     # a distractor, no class
        "bar": [([(-r, -0.15 * r), (r, -0.15 * r), (r, 0.15 * r), (-r, 0.15 * r)], True)],
    }[name]
    c, s = math.cos(angle), math.sin(angle)
    return [([(cx + c * x - s * y, cy + s * x + c * y) for x, y in points], filled) for points, filled in polygons]


def _cover(polygons, W, H):
    """How much of each pixel the polygons cover, 0..1."""
    mask = Image.new("L", (W * FINE, H * FINE))
    draw = ImageDraw.Draw(mask)
    for points, filled in polygons:
        draw.polygon([(x * FINE, y * FINE) for x, y in points], fill=255 if filled else 0)
    return np.asarray(mask.reduce(FINE), float) / 255


def _paint(image, cover, colour, rng):
    H, W = cover.shape
    slope = rng.uniform(-0.15, 0.15, 2)
    light = 1 + slope[0] * np.linspace(-1, 1, W)[None, :, None] + slope[1] * np.linspace(-1, 1, H)[:, None, None]
    image += cover[..., None] * (colour * light - image)


def _colour_unlike(image, cover, rng, least=90):
    """A random colour that differs from what it will cover: a shape nobody can see would be a wrong label."""
    under = image[cover > 0.5].mean(0)
    while True:
        colour = rng.uniform(0, 255, 3)
        if np.abs(colour - under).max() >= least:
            return colour


def _background(W, H, rng):
    image = np.empty((H, W, 3))
    base, slope = rng.uniform(40, 215, 3), rng.uniform(-50, 50, (2, 3))
    image[:] = base + slope[0] * np.linspace(-1, 1, W)[None, :, None] + slope[1] * np.linspace(-1, 1, H)[:, None, None]
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9), np.uint8)).resize((W, H), Image.Resampling.BICUBIC)
    image += (np.asarray(coarse, float)[..., None] - 128) * rng.uniform(0, 0.3)
    _clutter(image, rng, int(rng.integers(3, 9)), thickness=3)
    return image


def _clutter(image, rng, count, thickness):
    """Lines, scribbles and, in the background, half disks and bars: things that are there but belong to no class."""
    H, W = image.shape[:2]
    for _ in range(count):
        mask = Image.new("L", (W * FINE, H * FINE))
        draw, width = ImageDraw.Draw(mask), FINE * int(rng.integers(1, thickness + 1))
        kind = rng.choice((0, 1, 2, 3), p=(0.3, 0.3, 0.3, 0.1) if thickness > 1 else (0.5, 0.5, 0, 0))
        if kind < 2:
            turns = 2 if kind == 0 else 5
            points = rng.uniform(0, 1, (turns, 2)) * (W * FINE, H * FINE)
            if kind == 1:
                points = points[:1] + np.cumsum(rng.normal(0, 12 * FINE, (turns, 2)), 0)
            draw.line([tuple(p) for p in points], fill=255, width=width)
            cover = np.asarray(mask.reduce(FINE), float) / 255
        else:
            side = rng.uniform(10, 50)
            cover = _cover(shape("half" if kind == 3 else "bar", rng.uniform(0, W), rng.uniform(0, H), side,
                                 rng.uniform(0, 2 * math.pi)), W, H)
        image += cover[..., None] * (rng.uniform(0, 255, 3) - image)
