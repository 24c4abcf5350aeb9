"""What training changes in an image and its boxes: flips, scales, and the chain of SSD that AP-loss trains with (1904.06373; its code).

Everywhere: image uint8 (H, W, 3) RGB; boxes (R, 4) float64, continuous pixels, inside the image; R may be 0, and a side 1 pixel.
Functions are pure: all chance comes from rng (a NumPy Generator), no input is changed, a result may share memory with its input.
Boxes keep their order and dtype, stay inside the image and keep an area. Only crop, iou_crop and random_crop drop boxes, and return
which ones they kept. The chains ssd and flip_and_scale are functions to read, and to copy where another order is wanted.
"""
import math

import numpy as np
from PIL import Image

from tinydet import checks, data
from tinydet.ops import boxes as box_ops

INTERPOLATIONS = tuple(Image.Resampling[name] for name in ("NEAREST", "BILINEAR", "BICUBIC", "BOX", "LANCZOS"))
CROPS = ("none", 0.1, 0.3, 0.7, 0.9, "any")         # what iou_crop chooses from: the numbers are least IoUs
TRIES = 50


# Chains

def ssd(image, boxes, labels, rng, size, mean, axes=None, most=4.0):
    """SSD's augmentation in AP-loss's order: photometric, expand, IoU crop, mirror, warp to size x size (1904.06373; its code).

    size: pixels, or (width, height). mean: the colour (number or (3,), RGB, 0..255) around expanded images; most: by how much they grow, at
    most. subtract_mean is a step of its own, so that batches wait as uint8. axes: from colour_axes, for PCA lighting; None leaves that out.
    labels: (R,) or (R, n), one row a box, dropped with it (np.stack([labels, difficult], 1) keeps both aligned).
    Returns image uint8 (height, width, 3), boxes, labels.
    """
    image = photometric(image, rng, axes)
    image, boxes = expand(image, boxes, rng, mean, most=most)
    image, boxes, kept = iou_crop(image, boxes, rng)
    image, boxes = random_flip(image, boxes, rng)
    width, height = size if isinstance(size, tuple) else (size, size)
    image, boxes = resize(image, boxes, width, height, INTERPOLATIONS[rng.integers(len(INTERPOLATIONS))])
    return image, boxes, labels[kept]


def flip_and_scale(image, boxes, labels, rng, short=(600,), longest=1000):
    """The augmentation of Fast R-CNN (1504.08083) and OHEM (1604.03540): mirror, then one of several sizes at random.

    short: lengths of the short side to choose from, pixels; longest: no side gets longer (OHEM: 480, 576, 688, 864, 900 and
    2000). CHOICE: mirrored with probability 1/2, where the papers list every image twice. Returns image, boxes, labels.
    """
    image, boxes = random_flip(image, boxes, rng)
    image, boxes = scale(image, boxes, short_side_factor(image, short[rng.integers(len(short))], longest))
    return image, boxes, labels


# Mirror and size

def random_flip(image, boxes, rng, p=0.5, upside_down=False):
    """data.flip with probability p: (x1, x2) -> (W - x2, W - x1); upside_down: (y1, y2) -> (H - y2, H - y1). Returns image, boxes."""
    _check("augment.random_flip", image, boxes)
    if rng.random() >= p:
        return image, boxes
    if not upside_down:
        return data.flip(image, boxes)
    image, boxes = data.flip(image.transpose(1, 0, 2), boxes[:, [1, 0, 3, 2]])
    return image.transpose(1, 0, 2), boxes[:, [1, 0, 3, 2]]


def resize(image, boxes, width, height, how=Image.Resampling.BILINEAR):
    """Warp to width x height pixels: x -> x * width / W, y -> y * height / H. Returns image, boxes.

    how: one of INTERPOLATIONS. CHOICE: Pillow's, which average over all pixels they shrink; OpenCV's look at the nearest few.
    """
    _check("augment.resize", image, boxes)
    checks.whole("augment.resize", 1, width=width, height=height)
    H, W = image.shape[:2]
    if (W, H) != (width, height):
        image = np.asarray(Image.fromarray(image).resize((width, height), how))
    return image, boxes * np.tile([width, height], 2).astype(boxes.dtype) / np.tile([W, H], 2).astype(boxes.dtype)


def scale(image, boxes, factor):
    """Resize both sides by factor, bilinear, to whole pixels (halves up), at least 1. Returns image, boxes.

    Boxes follow the sides as rounded, and so stay in the image. Raises ValueError unless factor is positive and finite.
    """
    if not 0 < factor < math.inf:
        raise ValueError(f"augment.scale: factor must be positive and finite, got {factor}")
    H, W = image.shape[:2]
    return resize(image, boxes, *(max(1, math.floor(side * factor + 0.5)) for side in (W, H)))


def in_corner(images, height, width, normalise, dtype):
    """Images, uint8 (h, w, 3) of any sizes up to height x width, as one array (N, height, width, 3) of dtype: normalise(images) of each in the
    upper left corner, the rest 0, which is the mean."""
    x = np.zeros((len(images), height, width, 3), dtype)
    for n, image in enumerate(images):
        x[n, :image.shape[0], :image.shape[1]] = normalise(image[None])[0]
    return x


def short_side_factor(image, short, longest):
    """The factor that makes the short side `short`, or the long side `longest` if that one would, rounded, be longer (Fast R-CNN's code)."""
    H, W = image.shape[:2]
    factor = short / min(H, W)
    return factor if math.floor(factor * max(H, W) + 0.5) <= longest else longest / max(H, W)


# Colour. Brightness to hue take and return float32 (H, W, 3), 0..255.

def photometric(image, rng, axes=None):
    """Change the colours at random as SSD does (the code of AP-loss, 1904.06373): every change with probability 1/2, in this order.

    Brightness by U(-32, 32); contrast U(0.5, 1.5), before or (a coin) after saturation U(0.5, 1.5) and hue U(-18, 18) degrees;
    lighting by N(0, 0.1) along axes, if given. Returns uint8 (H, W, 3), rounded once, at the end.
    CHOICE: every change cuts at 0 and 255, since HSV is not defined beyond.
    """
    _check("augment.photometric", image)

    def coin():
        return rng.random() < 0.5

    x = image.astype(np.float32)
    if coin():
        x = brightness(x, rng.uniform(-32, 32))
    contrast_first = coin()
    if contrast_first and coin():
        x = contrast(x, rng.uniform(0.5, 1.5))
    if coin():
        x = saturation(x, rng.uniform(0.5, 1.5))
    if coin():
        x = hue(x, rng.uniform(-18, 18))
    if not contrast_first and coin():
        x = contrast(x, rng.uniform(0.5, 1.5))
    if axes is not None and coin():
        x = lighting(x, axes, rng.normal(0, 0.1, 3))
    return (x + np.float32(0.5)).astype(np.uint8)


def brightness(x, delta):
    """x + delta."""
    return (x + np.float32(delta)).clip(0, 255)


def contrast(x, factor):
    """factor * x: about black, not about the mean (unverified: SSD's code does so)."""
    return (x * np.float32(factor)).clip(0, 255)


def saturation(x, factor):
    """S' = min(1, factor * S) of HSV, hue and V = max(R, G, B) kept: c' = V - (V - c) * min(factor, 1 / S), S = (V - min) / V."""
    V, chroma = _value_chroma(x)
    factor = np.minimum(np.float32(factor), V / np.where(chroma > 0, chroma, 1))
    return V[..., None] - (V[..., None] - x) * factor[..., None]


def hue(x, degrees):
    """Turn the hue of HSV, saturation and value kept; grey stays grey. The formulas are those of the hexagon, h in [0, 6)."""
    V, chroma = _value_chroma(x)
    r, g, b = np.moveaxis(x, 2, 0)
    per = 1 / np.where(chroma > 0, chroma, 1)
    h = np.where(V == r, (g - b) * per, np.where(V == g, 2 + (b - r) * per, 4 + (r - g) * per)) + np.float32(degrees / 60)
    h -= 6 * np.floor(h / 6)
    shares = abs(h - 3) - 1, 2 - abs(h - 2), 2 - abs(h - 4)          # of the chroma in R, G, B: one is 1, one is 0
    return np.stack([V - chroma + chroma * s.clip(0, 1) for s in shares], 2)


def lighting(x, axes, amounts):
    """PCA lighting: x + 255 * axes @ amounts, one colour for the whole image. axes: (3, 3) from colour_axes; amounts: (3,)."""
    return (x + (255 * np.asarray(axes) @ amounts).astype(np.float32)).clip(0, 255)


def colour_axes(examples, most=50):
    """(3, 3) float64 for lighting: column k is eigenvector k of the covariance of the colours (RGB / 255), times its eigenvalue.

    From every fourth pixel each way of the first `most` images. CHOICE: published codes use ImageNet's figures, which our sources
    do not hold. Eigenvalues ascend; of either direction the one whose largest component is positive.
    """
    colours = np.concatenate([e.image()[::4, ::4].reshape(-1, 3) for e in examples[:most]]) / 255
    values, vectors = np.linalg.eigh(np.cov(colours, rowvar=False, bias=True))
    vectors *= np.sign(vectors[abs(vectors).argmax(0), range(3)])
    return vectors * values.clip(0)


def subtract_mean(image, mean):
    """image - mean as float32 (H, W, 3): what a net with published weights reads. mean: number or (3,), RGB, 0..255."""
    return image.astype(np.float32) - np.asarray(mean, np.float32)


def _value_chroma(x):
    """V = max(R, G, B) and V - min, each (H, W)."""
    r, g, b = np.moveaxis(x, 2, 0)
    V = np.maximum(np.maximum(r, g), b)
    return V, V - np.minimum(np.minimum(r, g), b)


# Place

def expand(image, boxes, rng, mean, p=0.5, most=4.0):
    """With probability p, put the image somewhere on a canvas of colour mean whose sides are f ~ U(1, most) times its own (SSD).

    The canvas is floor(f * W) x floor(f * H) pixels, the place uniform over whole pixels. mean: number or (3,), 0..255; the canvas
    is uint8, so it is rounded. Boxes are moved, none is dropped. Returns image, boxes.
    """
    _check("augment.expand", image, boxes)
    if rng.random() >= p:
        return image, boxes
    H, W = image.shape[:2]
    f = rng.uniform(1, most)
    width, height = int(f * W), int(f * H)
    left, top = int(rng.integers(width - W + 1)), int(rng.integers(height - H + 1))
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = np.full((width, 3), np.floor(np.asarray(mean) + 0.5), np.uint8)     # by rows: 20 times faster than by pixels
    canvas[top:top + H, left:left + W] = image
    return canvas, boxes + np.array([left, top, left, top], boxes.dtype)


def iou_crop(image, boxes, rng):
    """SSD's crop: choose one of CROPS; "none" leaves the image as it is, else draw up to 50 crops, and choose again if all fail.

    A crop has sides U(0.3, 1) times those of the image and a uniform place, cut to whole pixels (at least one). It fails if one
    side is more than twice the other, if its IoU with the box that overlaps it best is below the number chosen ("any": 0), or if
    no centre of a box lies in it. crop says which boxes stay. CHOICE: without boxes only the aspect can fail.
    Returns image, boxes, kept (indices of the boxes that stay, ascending).
    """
    _check("augment.iou_crop", image, boxes)
    H, W = image.shape[:2]
    while (choice := CROPS[rng.integers(len(CROPS))]) != "none":
        for _ in range(TRIES):
            w, h = rng.uniform(0.3, 1, 2) * (W, H)
            left, top = rng.uniform(0, 1, 2) * (W - w, H - h)
            if not 0.5 <= h / w <= 2:
                continue
            x1, y1 = int(left), int(top)
            box = np.array([x1, y1, max(x1 + 1, int(left + w)), max(y1 + 1, int(top + h))])
            if len(boxes) and choice != "any" and box_ops.iou(boxes, box[None].astype(boxes.dtype)).max() < choice:
                continue
            result = crop(image, boxes, box)
            if len(result[2]) or not len(boxes):
                return result
    return image, boxes, np.arange(len(boxes))


def random_crop(image, boxes, rng, least=0.75):
    """A part of the image, of its shape: sides f ~ U(least, 1) times its own, in whole pixels (rounded down, at least one), the place uniform
    over whole pixels. Returns image, boxes, kept, as crop. Raises ValueError unless least lies in (0, 1]."""
    if not 0 < least <= 1:
        raise ValueError(f"augment.random_crop: least must lie in (0, 1], got {least}")
    _check("augment.random_crop", image, boxes)
    sides, f = np.array(image.shape[1::-1]), rng.uniform(least, 1)
    part = np.maximum(1, (f * sides).astype(int))
    corner = rng.integers(sides - part + 1)
    return crop(image, boxes, np.concatenate([corner, corner + part]))


def crop(image, boxes, box):
    """Cut out box (x1, y1, x2, y2: whole pixels) of the image. Boxes whose centre lies strictly inside stay, cut at the border.

    One of no width or height has no area to keep and is dropped as well. Returns image, boxes, kept (indices, ascending).
    Raises ValueError for a box that is empty or leaves the image.
    """
    _check("augment.crop", image, boxes)
    H, W = image.shape[:2]
    x1, y1, x2, y2 = (int(v) for v in box)
    if not (0 <= x1 < x2 <= W and 0 <= y1 < y2 <= H):
        raise ValueError(f"augment.crop: box must hold a pixel and lie in the image of {W}x{H}, got ({x1}, {y1}, {x2}, {y2})")
    low, high = np.array([x1, y1], boxes.dtype), np.array([x2, y2], boxes.dtype)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    corners = boxes.clip(np.tile(low, 2), np.tile(high, 2))
    kept = np.flatnonzero(((low < centres) & (centres < high) & (corners[:, :2] < corners[:, 2:])).all(1))
    return image[y1:y2, x1:x2], corners[kept] - np.tile(low, 2), kept


def _check(op, image, boxes=None):
    checks.array(op, "image", image)
    if image.dtype != np.uint8:
        raise TypeError(f"{op}: image must be uint8, got {image.dtype}")
    if image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"{op}: image must have shape (H, W, 3) and hold a pixel, got {image.shape}")
    if boxes is not None:
        checks.float_array(op, "boxes", boxes, "(R, 4)")
