"""Cluttered synthetic scenes with boxes, from a seed: the data set that comes with the package."""
import math

import numpy as np
from PIL import Image, ImageDraw

from tinydet import checks
from tinydet.records import Example, tagged

CLASSES = ("cross", "disk", "ring", "square", "star", "triangle")
SMALLEST, LARGEST = 16, 84          # side of a shape in pixels: a factor of 5.25
TURN = 0.35                         # shapes are turned by up to 20 degrees either way
FINE = 3                            # shapes are drawn this much larger and averaged down: smooth edges
ANGLES = np.linspace(0, 2 * math.pi, 60, endpoint=False)
CIRCLE = [(math.cos(t), math.sin(t)) for t in ANGLES]
OTHERS = {                          # shapes that no scene has, for close_ups: (points, filled) as of shape, for a side of 2
    "arch": [([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (0.35, 0.85), (0.35, -0.3), (-0.35, -0.3), (-0.35, 0.85),
               (-0.85, 0.85)], True)],
    "arrow": [([(0, -1.1), (0.9, 0), (0.3, 0), (0.3, 1), (-0.3, 1), (-0.3, 0), (-0.9, 0)], True)],
    "ell": [([(-0.75, -1), (-0.2, -1), (-0.2, 0.45), (0.75, 0.45), (0.75, 1), (-0.75, 1)], True)],
    "heart": [([(math.sin(t)**3, (5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t) - 13 * math.cos(t)) / 15)
                for t in ANGLES], True)],
    "hourglass": [([(-0.8, -0.95), (0.8, -0.95), (0.2, 0), (0.8, 0.95), (-0.8, 0.95), (-0.2, 0)], True)],
    "moon": [(CIRCLE, True), ([(0.75 * x + 0.55, 0.75 * y) for x, y in CIRCLE], False)],
}
TEXTURES = "solid", "striped"
NEAR = tuple(f"{texture} {name}" for name in CLASSES for texture in TEXTURES)       # the classes of close_ups
FAR = tuple(f"{texture} {name}" for name in OTHERS for texture in TEXTURES)


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
    made = []
    for i in range(count):
        rng = np.random.default_rng([seed, *split.encode(), i])
        label, angle = int(rng.integers(len(CLASSES))), rng.uniform(-TURN, TURN)
        cover = _cover(shape(CLASSES[label], side / 2, side / 2, side * rng.uniform(0.6, 0.9), angle), side, side)
        made.append(tagged(f"{split}{i:05d}", (255 * cover).astype(np.uint8), (side, side), label))
    return made


def close_ups(count, seed, split="train", classes=NEAR + FAR, side=32):
    """`count` images (side, side) of one shape each, a list of Example with the class as tag: a source for transfer to scenes.

    A stand-in for ImageNet (Oquab et al., CVPR 2014; CHOICE). A class is a shape and a texture, "striped star"; texture plays the
    part of a dog's breed, which the target does not tell. NEAR: the six shapes of scenes; FAR: six of no scene (both CHOICE).
    A shape is 50 to 90 % of the side long, turned as in scenes, and up to 10 % of the side off the middle both ways (some lose a
    corner). Its colour is unlike the background, and every other stripe has the mirrored one, 255 - colour, unlike both: sums of
    the channels' differences are at least 180. Stripes are 6 to 10 % of the side wide, at any angle. The background is that of
    scenes, below 64 pixels painted at 64 and averaged down, so that lines stay thin; over everything lies noise.

    classes: a sequence of different names out of NEAR and FAR; the tag is the place in it, all equally likely. side: pixels, at
    least 16. Image i depends on (seed, split, i), classes and side alone; textures of a shape differ by the stripes alone.
    Raises ValueError for other classes, none or one twice, and for numbers out of range; TypeError for other types.
    """
    op = "scenes.close_ups"
    checks.whole(op, 0, count=count, seed=seed)
    checks.small(op, 16, side=side)
    if not isinstance(split, str):
        raise TypeError(f"{op}: split must be a name, got {split!r}")
    if not classes or any(c not in NEAR + FAR for c in classes) or len(set(classes)) < len(classes):
        raise ValueError(f"{op}: classes must be different names out of NEAR and FAR, at least one, got {classes!r}")
    made = []
    for i in range(count):
        rng = np.random.default_rng([seed, *split.encode(), i])
        label = int(rng.integers(len(classes)))
        image = _close_up(*classes[label].split(), side, rng)
        made.append(tagged(f"{split}{i:05d}", image, (side, side), label))
    return made


def _close_up(texture, name, side, rng):
    whole = _background(max(side, 64), max(side, 64), rng).clip(0, 255).astype(np.uint8)
    image = np.asarray(Image.fromarray(whole).resize((side, side), Image.Resampling.BOX), float)
    cx, cy, length = (side * float(v) for v in rng.uniform((0.4, 0.4, 0.5), (0.6, 0.6, 0.9)))
    cover = _cover(shape(name, cx, cy, length, rng.uniform(-TURN, TURN)), side, side)
    under, colour = image[cover > 0.5].mean(0), np.full(3, 127.5)
    while np.abs((colour - under, 255 - colour - under, 255 - 2 * colour)).sum(1).min() < 180:      # CHOICE: 0.7 of 255
        colour = rng.uniform(0, 255, 3)
    angle, period, phase = rng.uniform(0, math.pi), side * rng.uniform(0.12, 0.2), rng.random()
    if texture == "striped":
        across = (math.cos(angle) * np.arange(side) + math.sin(angle) * np.arange(side)[:, None]) / period + phase
        mirrored = (0.5 + period * (np.abs(across % 1 - 0.5) - 0.25)).clip(0, 1)    # 1 in every other stripe; edges a pixel wide
        colour = colour + mirrored[..., None] * (255 - 2 * colour)
    _paint(image, cover, colour, rng)
    image += rng.normal(0, rng.uniform(2, 6), image.shape)
    return image.clip(0, 255).astype(np.uint8)


def shape(name, cx, cy, side, angle):
    """Polygons of a shape of about `side` pixels: a list of (points, filled); a hole is a polygon that is not filled."""
    def circle(radius):
        return [(radius * x, radius * y) for x, y in CIRCLE]

    def regular(radii):                                             # the first corner points up
        return [(r * math.sin(2 * math.pi * i / len(radii)), -r * math.cos(2 * math.pi * i / len(radii)))
                for i, r in enumerate(radii)]

    r, arm = side / 2, side / 6
    polygons = [([(r * x, r * y) for x, y in points], filled) for points, filled in OTHERS[name]] if name in OTHERS else {
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
