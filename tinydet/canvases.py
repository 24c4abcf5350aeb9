"""Small labelled images pasted on cluttered canvases: classification and localization (OverFeat, sec. 4) from a classification set."""
import dataclasses
import functools

import numpy as np
from PIL import Image, ImageDraw

from tinydet import checks
from tinydet.data import Example
from tinydet.ops import boxes as box_ops

OVERLAP = 0.2                       # the most that the boxes of two items share, of the smaller one
TRIES = 20                          # places tried for an item; one that finds none is left out
PIECE = (0.3, 0.5)                  # width and height of a fragment, of those of the item it comes from: 8..14 of 28 pixels
TURNS = Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270       # of fragments: items stand upright
FAINTEST = 0.35                     # of a colour, where an item is black: else dark items would be seen on no dark background


class Canvas(Example):
    """An Example whose source is a function that paints the image: the same pixels at every call."""

    def image(self):
        return self.source() if callable(self.source) else super().image()


def canvases(examples, count, seed, split="train", size=96, sides=(28, 80), objects=(1, 1), fragments=(4, 10), threshold=20):
    """`count` canvases, a list of Example; canvas i depends on (examples, seed, split, i) and the options, not on count.

    Each is an RGB image with items out of examples: enlarged, mirrored or not, in one colour, wholly inside; behind them a smooth
    background, lines, and `fragments` of other items, too small to tell a class; over everything noise. Every class that examples
    hold is as likely as any other, and every example of a class. Images are painted when asked for (below 2 ms at size 96).
    Canvases of two splits share no item only if the examples share none: pass each split its own.

    examples: Examples with one label an image (tags, or boxes of one class: the whole image is then the item), such as read_idx
    gives. size: pixels, or (width, height). sides: least and largest longer side of an item's box, pixels, drawn log-uniformly.
    objects, fragments: least and largest number a canvas. The boxes of two items share at most OVERLAP of the smaller one, hence
    of their union; an item that finds no place in TRIES is left out.
    An item is the pixels whose brightest channel exceeds threshold, -1: all. Its tight box is cut out and resized (bilinear),
    its mask with it; the box (R, 4) float64 encloses the pixels that the mask covers at least half, and nothing is painted
    outside it (CHOICE). Labels: (R,) int64; none is difficult.
    Raises ValueError for no examples, one that has not one label, or (once drawn) no pixel above threshold, and for options out of
    range; TypeError for options that are no integers.
    """
    op = "canvases.canvases"
    checks.whole(op, 0, count=count, seed=seed)
    if not isinstance(split, str):
        raise TypeError(f"{op}: split must be a name, got {split!r}")
    W, H = size if isinstance(size, (tuple, list)) and len(size) == 2 else (size, size)
    checks.small(op, 16, width=W, height=H)
    _span(op, "sides", sides, 4, min(W, H))
    _span(op, "objects", objects, 1, 100)
    _span(op, "fragments", fragments, 0, 1000)
    checks.whole(op, -1, threshold=threshold)
    classes = _by_class(op, examples)
    made = []
    for i in range(count):
        paint = functools.partial(_paint_canvas, [seed, *split.encode(), i], classes, (W, H), sides, objects, fragments, threshold)
        items = _items(np.random.default_rng(paint.args[0]), classes, (W, H), sides, objects, threshold)
        made.append(Canvas(f"{split}{i:05d}", paint, (W, H), np.array([box for box, *_ in items], float),
                           np.array([label for _, label, *_ in items], np.int64), np.zeros(len(items), bool)))
    return made


def _span(op, name, span, least, most):
    """Raise unless span is (low, high), integers with least <= low <= high <= most."""
    if not isinstance(span, (tuple, list)) or len(span) != 2:
        raise ValueError(f"{op}: {name} must be (low, high), got {span!r}")
    checks.whole(op, least, **{name: span[0]})
    checks.whole(op, least, **{name: span[1]})
    if not span[0] <= span[1] <= most:
        raise ValueError(f"{op}: {name} must be (low, high) with {least} <= low <= high <= {most}, got {tuple(span)}")


def _by_class(op, examples):
    """A list of (label, [Example])."""
    found = {}
    for e in examples:
        labels = e.image_labels()
        if len(labels) != 1:
            raise ValueError(f"{op}: examples must have one label each, got {len(labels)} of {e.name}")
        found.setdefault(int(labels[0]), []).append(e)
    if not found:
        raise ValueError(f"{op}: examples must hold at least one image, got none")
    return sorted(found.items())


def _drawn(rng, classes, sides, threshold):
    """A random item: its class, its tight box cut out as a Pillow image, RGB and the mask as alpha, and a side to give it."""
    label, examples = classes[rng.integers(len(classes))]
    example = examples[rng.integers(len(examples))]
    image = example.image()
    item = np.empty((*image.shape[:2], 4), np.uint8)
    item[..., :3], item[..., 3] = image, (image.max(2) > threshold) * np.uint8(255)
    item = Image.fromarray(item)
    if (tight := item.getchannel("A").getbbox()) is None:
        raise ValueError(f"canvases.canvases: every image must have a pixel above threshold {threshold}, got none in {example.name}")
    item = item.crop(tight)
    if rng.random() < 0.5:
        item = item.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return label, item, sides[0] * (sides[1] / sides[0]) ** rng.random()


def _resized(item, factor):
    """float32 (h, w, 4): colours in 0..1 and how much of each pixel is covered, cut to the pixels of which that is at least half."""
    size = [max(1, round(length * factor)) for length in item.size]
    item = np.asarray(item.resize(size, Image.Resampling.BILINEAR))     # Pillow weighs the colours by alpha: no dark fringe
    inside = item[..., 3] >= min(128, item[..., 3].max())
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    return item[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1].astype(np.float32) / 255


def _items(rng, classes, size, sides, objects, threshold):
    """The items of a canvas, a list of (box, label, item): all that comes before the paint."""
    items = []
    for _ in range(rng.integers(objects[0], objects[1] + 1)):
        label, item, side = _drawn(rng, classes, sides, threshold)
        item = _resized(item, side / max(item.size))
        for _ in range(TRIES):
            box = _place(rng, item, size)
            if all(_shared(box, other) <= OVERLAP for other, *_ in items):
                items.append((box, label, item))
                break
    return items


def _place(rng, item, size):
    h, w = item.shape[:2]
    x, y = int(rng.integers(size[0] - w + 1)), int(rng.integers(size[1] - h + 1))
    return x, y, x + w, y + h


def _shared(a, b):
    """Intersection of two boxes over the area of the smaller one."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0, w) * max(0, h) / min((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))


def _paint_canvas(code, classes, size, sides, objects, fragments, threshold):
    """The image, uint8 (H, W, 3). The items are drawn again from the same numbers, then the clutter behind them."""
    rng = np.random.default_rng(code)
    items = _items(rng, classes, size, sides, objects, threshold)
    canvas = _background(rng, size)
    for _ in range(rng.integers(fragments[0], fragments[1] + 1)):
        _, item, side = _drawn(rng, classes, sides, threshold)
        part = [max(1, round(length * rng.uniform(*PIECE))) for length in item.size]
        x, y = (int(rng.integers(length - n + 1)) for length, n in zip(item.size, part))
        piece = item.crop((x, y, x + part[0], y + part[1])).transpose(TURNS[rng.integers(3)])
        if piece.getchannel("A").getbbox():
            piece = _resized(piece, side / max(item.size))
            _paint(canvas, _place(rng, piece, size), piece, rng)
    for box, _, item in items:
        _paint(canvas, box, item, rng)
    canvas += rng.standard_normal((*canvas.shape[:2], 1), np.float32) * np.float32(rng.uniform(2, 10))
    return canvas.clip(0, 255).astype(np.uint8)


def _paint(canvas, box, item, rng):
    """Paint an item in the one of four random colours that is least like what it covers."""
    part, image, cover = canvas[box[1]:box[3], box[0]:box[2]], FAINTEST + (1 - FAINTEST) * item[..., :3], item[..., 3:]
    colours = rng.uniform(60, 255, (4, 3)).astype(np.float32)
    under, mean = (cover.ravel() @ a.reshape(-1, 3) / cover.sum() for a in (part, image))
    part += cover * (image * colours[np.abs(colours * mean - under).max(1).argmax()] - part)


def _background(rng, size):
    """A smooth random background with lines, float32 (H, W, 3)."""
    coarse = rng.integers(0, 256, (*rng.integers(2, 8, 2), 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), np.float32)
    canvas = Image.fromarray((rng.uniform(40, 215, 3) + rng.uniform(0.1, 0.6) * (smooth - 128)).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(2, 8)):
        points = rng.uniform(0, 1, (rng.integers(2, 5), 2)) * size
        draw.line([tuple(p) for p in points], fill=tuple(rng.integers(0, 256, 3).tolist()), width=int(rng.integers(1, 4)))
    return np.array(canvas, np.float32)
