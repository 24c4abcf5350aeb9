"""Small labelled images pasted on cluttered canvases: a set for localization (OverFeat, sec. 4) out of one for classification."""
import dataclasses
import functools

import numpy as np
from PIL import Image, ImageDraw

from tinydet import checks
from tinydet.data import Example

OVERLAP = 0.2                       # most that the boxes of two items share, of the smaller one: an IoU of 1/9
TRIES = 20                          # places tried for an item
PIECE = (0.3, 0.5)                  # sides of a fragment, of those of the item it comes from: 8 to 14 of 28 pixels
TURNS = Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270      # of fragments; items stand upright
FAINTEST = 0.35                     # of an item's colour, where it is black: it must be seen on a dark background too


class Canvas(Example):
    """An Example whose source is a function that paints the image: the same pixels at every call, none kept."""

    def image(self):
        return self.source() if callable(self.source) else super().image()


def canvases(examples, count, seed, split="train", size=96, sides=(28, 80), objects=(1, 1), fragments=(3, 9), threshold=20):
    """`count` canvases, a list of Example; canvas i depends on seed, split, i, the examples and the options, not on count.

    A canvas holds items from examples, enlarged, in one colour each, half of them mirrored, wholly inside; behind them a smooth
    background, lines, and fragments of items, turned and too small to tell a class; over everything noise. The classes are
    equally likely, however many examples each has. Images are painted when asked for (about 2 ms at size 96), by any thread.
    Splits share no item only if their examples share none: give each split examples of its own.

    examples: Examples with one label an image, such as data.read_idx gives. Labels are theirs.
    size: pixels, or (width, height). sides: least and largest length of an item's longer side, pixels, drawn log-uniformly.
    objects, fragments: least and largest number in a canvas. The boxes of two items share at most OVERLAP of the smaller one; an
    item that finds no place in TRIES is left out. threshold: an item is the pixels whose brightest channel exceeds it; -1: all.
    boxes (R, 4), tight: the tight box of an item's pixels is cut out and resized with its mask (bilinear); the box encloses the
    pixels that the mask then covers at least half, and nothing of the item is painted outside it (CHOICE). None is difficult.
    Raises ValueError for no examples, one without exactly one label or, when drawn, without a pixel above threshold, and for
    options out of range; TypeError for options of another type.
    """
    op = "canvases.canvases"
    checks.whole(op, 0, count=count, seed=seed)
    checks.whole(op, -1, threshold=threshold)
    if not isinstance(split, str):
        raise TypeError(f"{op}: split must be a name, got {split!r}")
    W, H = _two(op, "size", size if isinstance(size, (tuple, list)) else (size, size), "(width, height)")
    checks.small(op, 16, width=W, height=H)
    spans = ("sides", sides, 4, min(W, H)), ("objects", objects, 1, 100), ("fragments", fragments, 0, 1000)
    for name, span, least, most in spans:
        low, high = _two(op, name, span, "(low, high)")
        checks.whole(op, least, **{f"{name} (low)": low, f"{name} (high)": high})
        if not low <= high <= most:
            raise ValueError(f"{op}: {name} must be (low, high), low <= high <= {most}, got ({low}, {high})")
    recipe, made = _Recipe(_by_class(op, examples), (W, H), sides, objects, fragments, threshold), []
    for i in range(count):
        code = [seed, *split.encode(), i]
        boxes, labels, _ = zip(*recipe.items(np.random.default_rng(code)))
        made.append(Canvas(f"{split}{i:05d}", functools.partial(recipe.image, code), (W, H), np.array(boxes, float),
                           np.array(labels, np.int64), np.zeros(len(labels), bool)))
    return made


def _two(op, name, value, what):
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{op}: {name} must be {what}, got {value!r}")
    return value


def _by_class(op, examples):
    """A list of (label, [Example])."""
    found = {}
    for e in examples:
        if len(labels := e.image_labels()) != 1:
            raise ValueError(f"{op}: examples must have one label each, got {len(labels)} of {e.name}")
        found.setdefault(int(labels[0]), []).append(e)
    if not found:
        raise ValueError(f"{op}: examples must hold at least one image, got none")
    return sorted(found.items())


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """What the canvases of a set have in common: the arguments of canvases."""

    classes: list
    size: tuple
    sides: tuple
    objects: tuple
    fragments: tuple
    threshold: int

    def items(self, rng):
        """The items of a canvas, a list of (box, label, pixels): the first thing that is drawn from rng."""
        items = []
        for _ in range(rng.integers(self.objects[0], self.objects[1] + 1)):
            label, item, side = self._drawn(rng)
            item = _resized(item, side / max(item.size))
            for _ in range(TRIES):
                box = self._place(item, rng)
                if all(_shared(box, other) <= OVERLAP for other, *_ in items):
                    items.append((box, label, item))
                    break
        return items

    def image(self, code):
        """The image, uint8 (H, W, 3). The items are drawn again from the same numbers, then what lies behind them."""
        rng = np.random.default_rng(code)
        items, canvas = self.items(rng), _background(self.size, rng)
        for _ in range(rng.integers(self.fragments[0], self.fragments[1] + 1)):
            _, item, side = self._drawn(rng)
            w, h = (max(1, round(length * rng.uniform(*PIECE))) for length in item.size)
            x, y = (item.width - w) * int(rng.integers(2)), (item.height - h) * int(rng.integers(2))    # a corner: outlined
            piece = item.crop((x, y, x + w, y + h)).transpose(TURNS[rng.integers(3)])
            if piece.getchannel("A").getbbox():
                piece = _resized(piece, side / max(item.size))
                _paint(canvas, self._place(piece, rng), piece, rng)
        for box, _, item in items:
            _paint(canvas, box, item, rng)
        canvas += rng.standard_normal((*canvas.shape[:2], 1), np.float32) * rng.uniform(2, 10)
        return canvas.clip(0, 255).astype(np.uint8)

    def _drawn(self, rng):
        """A random item: class, tight box cut out as a Pillow image with the mask as alpha, and a length for the longer side."""
        label, examples = self.classes[rng.integers(len(self.classes))]
        example = examples[rng.integers(len(examples))]
        image = example.image()
        item = np.empty((*image.shape[:2], 4), np.uint8)
        item[..., :3] = image
        brightest = np.maximum(np.maximum(image[..., 0], image[..., 1]), image[..., 2])     # max(2) takes five times as long
        item[..., 3] = np.where(brightest > self.threshold, 255, 0)
        item = Image.fromarray(item)
        if (tight := item.getchannel("A").getbbox()) is None:
            raise ValueError(f"canvases.canvases: examples must have a pixel above threshold {self.threshold}, got none in "
                             f"{example.name}")
        item = item.crop(tight)
        if rng.random() < 0.5:
            item = item.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return label, item, self.sides[0] * (self.sides[1] / self.sides[0]) ** rng.random()

    def _place(self, item, rng):
        h, w = item.shape[:2]
        x, y = int(rng.integers(self.size[0] - w + 1)), int(rng.integers(self.size[1] - h + 1))
        return x, y, x + w, y + h


def _resized(item, factor):
    """float32 (h, w, 4) in 0..1, colours and how much of a pixel is covered, cut to the pixels that are covered at least half."""
    size = [max(1, round(length * factor)) for length in item.size]
    item = np.asarray(item.resize(size, Image.Resampling.BILINEAR))     # Pillow weighs colours by alpha: no dark fringe
    inside = item[..., 3] >= min(128, item[..., 3].max())
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    return item[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1].astype(np.float32) / 255


def _shared(a, b):
    """Intersection of two boxes over the area of the smaller one."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0, w) * max(0, h) / min((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (a, b))


def _paint(canvas, box, item, rng):
    """Paint an item in that of four random colours that is least like what it covers."""
    part, image, cover = canvas[box[1]:box[3], box[0]:box[2]], FAINTEST + (1 - FAINTEST) * item[..., :3], item[..., 3:]
    colours = rng.uniform(60, 255, (4, 3)).astype(np.float32)
    under, mean = (cover.ravel() @ a.reshape(-1, 3) / cover.sum() for a in (part, image))
    part += cover * (image * colours[np.abs(colours * mean - under).max(1).argmax()] - part)


def _background(size, rng):
    """A smooth random background with lines, float32 (H, W, 3)."""
    coarse = rng.uniform(40, 215, 3) + rng.uniform(0.1, 0.6) * rng.integers(-128, 128, (*rng.integers(2, 8, 2), 3))
    canvas = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(2, 7)):
        points = rng.uniform(0, 1, (rng.integers(2, 5), 2)) * size
        draw.line([tuple(p) for p in points], fill=tuple(rng.integers(0, 256, 3).tolist()), width=int(rng.integers(1, 4)))
    return np.array(canvas, np.float32)
