"""Strong supervision of Oquab, Bottou, Laptev, Sivic (CVPR 2014): square patches of an image, what each is an example of, and what
the scores of all patches say of the image (paper, sec. 3.2 and 3.3). For action classification: the one patch of a
person (paper, sec. 4). Sections are those of the report of November 2013 (HAL hal-00911179), as in oquab.py.

Training: for each image tiles() and label(), once; resample() over all patches; cut() to the window of the net, and
softmax_loss.loss over K classes and the background, label K. Test: y = softmax of all tiles, without the background's column, then
image_score() and heat_map(), which run where y lies. All else runs on the host.
"""
import math
import numbers

import numpy as np
from PIL import Image

from tinydet import checks
from tinydet.backend import array_module
from tinydet.ops import boxes as box_ops
from tinydet.proposals import MOST_WINDOWS

LAMBDAS = (1, 1.3, 1.6, 2, 2.4, 2.8, 3.2, 3.6, 4)       # the paper says "eight scales" and lists these nine
REDUCTIONS = ("mean", "sum")
LEAST_SQUARE, MOST_SQUARE = 0.01, 1 << 13               # pixels, side of what mirrored_patch cuts out


# Tiling and labels (paper, sec. 3.2)

def tiles(width, height, lambdas=LAMBDAS, overlap=2 / 3):
    """Square patches of several sizes on regular grids over an image (paper, sec. 3.2).

        s = min(width, height) / lambda;   n(L) = 1 if L <= s, else 1 + ceil((L - s) / ((1 - overlap) * s) - 1e-9)
    n(width) x n(height) patches, starts evenly spaced from 0 to L - s: the last ones touch the border, neighbours share at least
    `overlap` of the side. CHOICE 2/3: the paper's "at least 50%" and "around 500 patches" meet there (512 for 500x375; 1/2 gives
    275).
    Returns (M, 4) float64, pixels, inside the image; scale by scale in the order of lambdas, each row by row.
    Raises ValueError for sides below 1, no lambda, a lambda below 1, an overlap outside [0, 1), more than MOST_WINDOWS patches.
    """
    op = "oquab_patches.tiles"
    _number(op, 1, width=width, height=height)
    if len(lambdas) == 0:
        raise ValueError(f"{op}: lambdas must hold at least one number, got none")
    _number(op, 1, **{f"lambdas[{i}]": v for i, v in enumerate(lambdas)})
    _number(op, 0, overlap=overlap)
    if overlap >= 1:
        raise ValueError(f"{op}: overlap must lie below 1, got {overlap!r}")
    sides = [min(width, height) / v for v in lambdas]
    counts = [[float(1 + max(0, np.ceil((L - s) / s / (1 - overlap) - 1e-9))) for L in (width, height)] for s in sides]
    if (count := sum(math.prod(n) for n in counts)) > MOST_WINDOWS:
        raise ValueError(f"{op}: an image must have at most {MOST_WINDOWS} patches, got {count:.0f}")
    found = []
    for s, (n_x, n_y) in zip(sides, counts):
        y, x = np.meshgrid(np.linspace(0, height - s, int(n_y)), np.linspace(0, width - s, int(n_x)), indexing="ij")
        found.append(np.stack([x, y, np.minimum(x + s, width), np.minimum(y + s, height)], 2).reshape(-1, 4))
    return np.concatenate(found)


def label(tiles, boxes, labels, background, difficult=None, same_class_ok=False):
    """What each patch P is an example of (paper, sec. 3.2 and Fig. 4): (M,) int64.

    An object of box B qualifies if |P and B| >= 0.2 |P| (else it is too small) and >= 0.6 |B| (else it is truncated), both
    compared as 5 I >= |P| and 5 I >= 3 |B|, exact for whole pixels. One qualifies: its class. None: background, even if parts of
    objects are visible. Several: -1, the patch is deleted; with same_class_ok its class if all are of one (CHOICE; the
    text says "object"). CHOICE: -1 too where a difficult object qualifies. The text's criterion (iii), read literally, would
    delete every patch that touches two boxes; Fig. 4 does not.
    tiles: (M, 4), boxes: (R, 4) float, pixels, M and R may be 0; labels: (R,) integers 0..background - 1; difficult: (R,) bool,
    None: none is. A box without area never qualifies.
    Raises ValueError for shapes, values, a patch without area; TypeError for dtypes.
    """
    op = "oquab_patches.label"
    checks.float_array(op, "tiles", tiles, "(M, 4)")
    checks.float_array(op, "boxes", boxes, "(R, 4)")
    tiles, boxes = tiles.astype(np.float64), boxes.astype(np.float64)
    checks.finite(op, tiles=tiles, boxes=boxes)
    checks.areas(op, tiles=tiles, boxes=boxes)
    checks.integers(op, "labels", labels, (len(boxes),))
    checks.small(op, 0, background=background)
    if labels.size and not 0 <= labels.min() <= labels.max() < background:
        raise ValueError(f"{op}: labels must lie in 0..{background - 1}, got {labels.min()}..{labels.max()}")
    if difficult is not None:
        checks.same_shape(op, labels.shape, difficult=difficult)
        if difficult.dtype != bool:
            raise TypeError(f"{op}: difficult must be bool, got {difficult.dtype}")
    area = _areas(op, tiles)
    five = 5 * box_ops.intersection(tiles, boxes)
    qualifies = (five >= area[:, None]) & (five >= 3 * box_ops.area(boxes))
    labels = labels.astype(np.int64)
    highest = np.where(qualifies, labels, -1).max(1, initial=-1)
    lowest = np.where(qualifies, labels, background).min(1, initial=background)
    count = qualifies.sum(1)
    result = np.where((count == 1) | same_class_ok & (lowest == highest), highest, -1)
    result[count == 0] = background
    if difficult is not None:
        result[(qualifies & difficult).any(1)] = -1
    return result


def resample(labels, background, share, rng):
    """Indices, ascending, of the patches that train (paper, sec. 3.2): all positives, a random share of the background.

    floor(share * backgrounds + 0.5) backgrounds, without repetition; none deleted. The paper: share = 0.1, drawn once.
    labels: (M,) integers as of label(), of one image or of all; rng: NumPy Generator. Returns (n,) int64.
    Raises ValueError for labels outside -1..background or a share outside [0, 1], TypeError for dtypes.
    """
    op = "oquab_patches.resample"
    checks.small(op, 0, background=background)
    checks.array(op, "labels", labels)
    checks.labels(op, labels, labels.size, background + 1)
    _number(op, 0, share=share)
    if share > 1:
        raise ValueError(f"{op}: share must lie in [0, 1], got {share!r}")
    others = np.flatnonzero(labels == background)
    kept = rng.choice(others, math.floor(share * len(others) + 0.5), replace=False)
    return np.sort(np.concatenate([np.flatnonzero((labels >= 0) & (labels != background)), kept]))


# Pixels

def cut(image, tiles, side):
    """The patches as pixels: uint8 (M, side, side, 3), each resized from its exact place, bilinear; CHOICE: antialiased, by Pillow.

    image: uint8 (H, W, 3); tiles: (M, 4) float, inside the image, M may be 0; side: the net's window. What is no square is warped.
    Raises ValueError for shapes, a tile that leaves the image by more than 1e-6 pixels or has no area; TypeError for dtypes.
    """
    op = "oquab_patches.cut"
    _image(op, image)
    checks.small(op, 1, side=side)
    checks.float_array(op, "tiles", tiles, "(M, 4)")
    H, W = image.shape[:2]
    inside = tiles.astype(np.float64).clip(0, (W, H, W, H))
    outside = ~(abs(tiles - inside) <= 1e-6).all(1)                             # also NaN
    if outside.any():
        raise ValueError(f"{op}: tiles must lie in the image of {W}x{H}, got {tuple(tiles[outside][0].tolist())}")
    _areas(op, inside.astype(np.float32).astype(np.float64))                    # Pillow takes float32
    patches, picture = np.empty((len(tiles), side, side, 3), np.uint8), Image.fromarray(image)
    for patch, box in zip(patches, inside.tolist()):
        patch[...] = picture.resize((side, side), Image.Resampling.BILINEAR, box=tuple(box))
    return patches


def mirrored_patch(image, box, side, context=1.0):
    """The patch of an object, as in the action task (paper, sec. 4): uint8 (side, side, 3), resized as in cut().

    The square around the middle of the box, of side `context` times the box's longer side (CHOICE; the paper names no size).
    Beyond its borders the image goes on mirrored, again and again: pixel -1 is pixel 0, -2 is 1.
    image: uint8 (H, W, 3); box: four numbers, it may leave the image but not wholly.
    Raises ValueError for a box without area or outside the image, and a square whose side is below LEAST_SQUARE or above
    MOST_SQUARE; TypeError for dtypes.
    """
    op = "oquab_patches.mirrored_patch"
    _image(op, image)
    checks.small(op, 1, side=side)
    _number(op, 0, context=context)
    box = np.asarray(box, np.float64)
    checks.same_shape(op, (4,), box=box)
    (x1, y1, x2, y2), (H, W) = box.tolist(), image.shape[:2]
    if not (x1 < x2 and y1 < y2 and x1 < W and y1 < H and x2 > 0 and y2 > 0):       # also NaN
        raise ValueError(f"{op}: box must have an area and touch the image of {W}x{H}, got {tuple(box.tolist())}")
    s = context * max(x2 - x1, y2 - y1)
    if not LEAST_SQUARE <= s <= MOST_SQUARE:
        raise ValueError(f"{op}: the square must be {LEAST_SQUARE} to {MOST_SQUARE} pixels wide, got {s:g}")
    left, top, margin = (x1 + x2 - s) / 2, (y1 + y2 - s) / 2, math.ceil(max(1, s / side)) + 1       # the filter looks beyond s
    x, y = (math.floor(low) - margin + np.arange(math.ceil(s) + 1 + 2 * margin) for low in (left, top))
    region = image[_mirrored(y, H)[:, None], _mirrored(x, W)]
    place = left - float(x[0]), top - float(y[0])
    place = *place, place[0] + s, place[1] + s
    return np.array(Image.fromarray(region).resize((side, side), Image.Resampling.BILINEAR, box=place))


def _mirrored(i, n):
    """The pixel 0..n - 1 that stands at each place i, integers of any size, of n pixels mirrored at both ends."""
    i = i % (2 * n)
    return np.minimum(i, 2 * n - 1 - i)


# Scores of an image (paper, sec. 3.3 and 4)

def image_score(y, k=5):
    """score_c = (1 / M) sum_i y[i, c]^k over all M patches of an image (paper, sec. 3.3, eq. 1): (K,), same dtype and device.

    y: (M, K) softmax outputs; the background's column is not used: leave it out. k: at least 1, the paper's validation took 5.
    The mean, not the sum of the slides, so that images with unlike numbers of patches compare.
    Raises ValueError for no patch, k below 1, on the host for NaN or infinity; TypeError for dtypes.
    """
    op = "oquab_patches.image_score"
    checks.float_array(op, "y", y, "(M, K)")
    checks.finite(op, y=y)
    _number(op, 1, k=k)
    if len(y) == 0:
        raise ValueError(f"{op}: y must hold at least one patch, got {y.shape}")
    return (y ** float(k)).mean(0)


def heat_map(tiles, y, width, height, reduce="mean"):
    """Where the classes are: (height, width, K), each pixel the mean or sum of y over the patches that cover it (paper, sec. 4).

        sum[i, j, c] = sum_m rows[m, i] columns[m, j] y[m, c];   mean: divided by sum_m rows[m, i] columns[m, j]
    A patch covers the pixels whose middles lie in [x1, x2) x [y1, y2). Pixels that none covers are 0. "mean" is the paper's text,
    "sum" its slides; y enters without the power k (the paper names none).
    tiles: (M, 4) float, pixels, on the host or beside y; y: (M, K) float32 or float64, gives the result's dtype and device; M may
    be 0. Time grows with M * K * height * width: of a photograph of many megapixels take a smaller map, tiles and all.
    Raises ValueError for shapes, another reduce, on the host for NaN or infinity; TypeError for dtypes.
    """
    op, xp = "oquab_patches.heat_map", array_module(y)
    checks.float_array(op, "tiles", tiles, "(M, 4)")
    checks.float_array(op, "y", y, f"({len(tiles)}, K)")
    checks.finite(op, tiles=tiles, y=y)
    checks.small(op, 1, width=width, height=height)
    if reduce not in REDUCTIONS:
        raise ValueError(f"{op}: reduce must be one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    x1, y1, x2, y2 = xp.asarray(tiles).T[..., None]
    i, j = xp.arange(height) + 0.5, xp.arange(width) + 0.5
    rows, columns = ((y1 <= i) & (i < y2)).astype(y.dtype).T, ((x1 <= j) & (j < x2)).astype(y.dtype)
    result = xp.empty((height, width, y.shape[1]), y.dtype)
    for c in range(y.shape[1]):
        result[..., c] = rows @ (columns * y[:, c, None])
    if reduce == "mean":
        result /= (rows @ columns).clip(1, None)[..., None]
    return result


def _number(op, least, **values):
    for name, v in values.items():
        if isinstance(v, bool) or not isinstance(v, numbers.Real) or not least <= v < math.inf:
            raise ValueError(f"{op}: {name} must be a finite number of at least {least}, got {v!r}")


def _areas(op, tiles):
    """Areas of the tiles. Raises ValueError for one that has none."""
    area = box_ops.area(tiles)
    if not (area > 0).all():
        raise ValueError(f"{op}: every tile must have an area, got {tuple(tiles[~(area > 0)][0].tolist())}")
    return area


def _image(op, image):
    checks.array(op, "image", image)
    if image.dtype != np.uint8:
        raise TypeError(f"{op}: image must be uint8, got {image.dtype}")
    if image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"{op}: image must have shape (H, W, 3) and hold a pixel, got {image.shape}")
