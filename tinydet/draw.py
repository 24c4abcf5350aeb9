"""Pictures: boxes on images, sheets of examples, curves. Pillow draws the images, matplotlib (extra `examples`) the curves."""
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tinydet import checks, files

COLOURS = ("#e6194b", "#1f8f3a", "#2f55d4", "#f58231", "#911eb4", "#00868b", "#b8860b", "#d1157f", "#556b2f", "#6b4226")
HEAT = ((0, 0, 96), (40, 90, 220), (60, 190, 150), (250, 220, 60), (230, 30, 20))     # of heat maps, RGB, from low to high


def boxes(image, boxes, labels, classes, scores=None, enlarge=1.0, bracket=None):
    """An image (uint8 (H, W, 3)) with its boxes as a Pillow image; each class has its colour, its name (and score) beside the box.

    boxes: (R, 4), pixels of the image; labels: (R,), indices into the names `classes`; scores: (R,) or None. enlarge: factor of the sides.
    bracket: (R,) bool, names to put in brackets (difficult objects, which do not count).
    """
    picture = _enlarged(Image.fromarray(image), enlarge)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=max(9, min(16, min(picture.size) // 28)))
    width = max(1, round(min(picture.size) / 200))
    for i, (box, label) in enumerate(zip(boxes, labels)):
        x1, y1, x2, y2 = (float(v) * enlarge for v in box)
        colour = COLOURS[int(label) % len(COLOURS)]
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=width)
        text = classes[int(label)] if scores is None else f"{classes[int(label)]} {scores[i]:.2f}"
        text = f"({text})" if bracket is not None and bracket[i] else text
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        x = min(max(0, x1), max(0, picture.width - right - 4))
        y = y1 - bottom - 3 if y1 - bottom - 3 >= 0 else min(y1 + width, picture.height - bottom - 3)
        draw.rectangle((x, y, x + right + 4, y + bottom + 3), fill=colour)
        draw.text((x + 2, y + 1), text, fill="white", font=font)
    return picture


def _enlarged(picture, factor):
    """A Pillow image with sides `factor` times as long, bicubic, in whole pixels, at least 1."""
    return picture if factor == 1 else picture.resize([max(1, round(side * factor)) for side in picture.size], Image.Resampling.BICUBIC)


def regions(image, boxes, labels, background, objects=None, enlarge=1.0):
    """The regions that train, on their image (uint8 (H, W, 3)), as a Pillow image: each in the colour of its class, the background grey, and, if
    given, the objects (G, 4) in white below. boxes: (R, 4), labels: (R,)."""
    picture = _enlarged(Image.fromarray(image), enlarge)
    draw = ImageDraw.Draw(picture)
    white = [] if objects is None else [(box, "white", 3) for box in objects]
    order = np.argsort(np.asarray(labels) != background, kind="stable")         # the background first, below the others
    for box, colour, width in white + [(boxes[i], "#9a9a9a" if labels[i] == background else COLOURS[int(labels[i]) % len(COLOURS)], 1)
                                       for i in order]:
        x1, y1, x2, y2 = (float(v) * enlarge for v in box)
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=width)
    return picture


def sheet(pictures, columns, captions=None, gap=6):
    """Pillow images side by side, `columns` in a row, `gap` pixels apart, all scaled to the widest one's width, with a caption line above
    each if given. Raises ValueError for no pictures."""
    if not pictures:
        raise ValueError("draw.sheet: pictures must hold at least one image, got none")
    width = max(p.width for p in pictures)
    pictures = [p if p.width == width else p.resize((width, max(1, round(p.height * width / p.width)))) for p in pictures]
    font = ImageFont.load_default(size=14)
    line = 20 if captions else 0
    rows = [pictures[i:i + columns] for i in range(0, len(pictures), columns)]
    heights = [max(p.height for p in row) + line for row in rows]
    out = Image.new("RGB", (columns * (width + gap) + gap, sum(heights) + gap * (len(rows) + 1)), "white")
    draw, y, n = ImageDraw.Draw(out), gap, 0
    for row, height in zip(rows, heights):
        for c, p in enumerate(row):
            x = gap + c * (width + gap)
            if captions:
                draw.text((x, y), captions[n], fill="black", font=font)
            out.paste(p, (x, y + line))
            n += 1
        y += height + gap
    return out


def heat_map(image, values, box, low=0.0, high=1.0, enlarge=1.0):
    """Numbers over an image (uint8 (H, W, 3)), as a Pillow image: the image in grey, half and half with HEAT's colours where there are values.

    values: (h, w), a grid of cells. box: (x1, y1, x2, y2), pixels, the part of the image that the cells tile: a value holds in the
    middle of its cell, in between it is interpolated (bilinear), from there to the border of the grid it stays. Beyond the image
    nothing is drawn. low, high: the values of the first and last colour; what lies beyond has them, too.
    Raises ValueError unless values are finite, at least one, the box has an area, and low < high.
    """
    values = np.asarray(values, float)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all() or not (box[0] < box[2] and box[1] < box[3] and low < high):
        raise ValueError("draw.heat_map: values must be (h, w), at least one, finite, the box have an area, low be below high, got "
                         f"{values.shape}, {tuple(box)}, {low}, {high}")
    grey = _enlarged(Image.fromarray(image).convert("L"), enlarge)
    at, inside = [], []
    for side, cells, start, end in zip(grey.size[::-1], values.shape, box[1::-1], box[:1:-1]):
        share = ((np.arange(side) + 0.5) / enlarge - start) / (end - start)             # of each pixel's middle along the grid
        at.append(np.stack([np.interp(share * cells - 0.5, np.arange(cells), one) for one in np.eye(cells)], 1))
        inside.append((share >= 0) & (share < 1))
    heat = (at[0] @ values @ at[1].T - low) / (high - low)
    colours = np.stack([np.interp(heat, np.linspace(0, 1, len(HEAT)), c) for c in zip(*HEAT)], 2)
    out = np.repeat(np.asarray(grey, float)[..., None], 3, 2)
    out = np.where((inside[0][:, None] & inside[1])[..., None], (out + colours) / 2, out)
    return Image.fromarray((out + 0.5).astype(np.uint8))


def filters(w, strongest=4, enlarge=None, width=1000):
    """The filters of a convolution, w (kh, kw, Cin, Cout), as a Pillow image: one tile each, in order, row by row.

    With three input channels a tile is in colour (RGB); else a strip of grey squares, one for each of the `strongest` input channels
    (largest sum of squares, surest first; ties: the lower channel), or of all if there are no more. 0 is mid grey; the largest
    absolute weight of a filter is white, or black if negative. enlarge: pixels a weight, default about 40 a square. width: of the
    picture in pixels; wider only if no tile fits. Raises ValueError unless w has that shape, is finite and not empty, and the
    other numbers are at least 1.
    """
    w = np.asarray(w, float)
    if w.ndim != 4 or not w.size or not np.isfinite(w).all():
        raise ValueError(f"draw.filters: w must be (kh, kw, Cin, Cout), finite, not empty, got {w.shape}")
    kh, kw, Cin, Cout = w.shape
    enlarge = max(1, 40 // kw) if enlarge is None else enlarge
    checks.whole("draw.filters", 1, strongest=strongest, enlarge=enlarge, width=width)
    shades = 127.5 + 127.5 * w / np.maximum(abs(w).max((0, 1, 2)), np.finfo(float).tiny)
    shades, tiles = (shades + 0.5).astype(np.uint8).repeat(enlarge, 0).repeat(enlarge, 1), []
    for n in range(Cout):
        order = np.argsort(-(w[..., n] ** 2).sum((0, 1)), kind="stable")[:strongest]
        squares = [shades[..., n]] if Cin == 3 else [shades[..., [c, c, c], n] for c in order]
        tiles.append(sheet([Image.fromarray(s) for s in squares], len(squares), gap=1))
    gap = 6
    tiles = sheet(tiles, min(Cout, max(1, (width - gap) // (tiles[0].width + gap))), gap=gap)
    out = Image.new("RGB", (max(width, tiles.width), tiles.height), "white")
    out.paste(tiles)
    return out


def detections_sheet(examples, detections, classes, cut, columns=2):
    """Ground truth and detections side by side: two pictures an image. cut: per class, the score from which a box is shown."""
    pictures, captions = [], []
    for example, (b, labels, scores) in zip(examples, detections):
        image, shown = example.image(), scores >= np.array([cut[classes[int(k)]] for k in labels], float)
        enlarge = 480 / max(image.shape[:2]) if max(image.shape[:2]) < 320 else 1.0
        pictures += [boxes(image, example.boxes, example.labels, classes, enlarge=enlarge, bracket=example.difficult),
                     boxes(image, b[shown], labels[shown], classes, scores[shown], enlarge)]
        captions += [f"{example.name}: ground truth", f"{example.name}: detected"]
    return sheet(pictures, 2 * columns, captions)


def close_up(image, box, context=1.0, least=48):
    """The part of an image around a box: the box, `context` of its sides more in all, at least `least` pixels. Returns the part
    and its corner (x, y), to subtract from boxes."""
    x1, y1, x2, y2 = (float(v) for v in box)
    side = max((1 + context) * max(x2 - x1, y2 - y1), least)
    H, W = image.shape[:2]
    left, top = (min(max(0, round(centre - side / 2)), max(0, length - 1)) for centre, length in (((x1 + x2) / 2, W), ((y1 + y2) / 2, H)))
    right, bottom = min(W, left + max(1, round(side))), min(H, top + max(1, round(side)))
    return image[top:bottom, left:right], (left, top)


def false_positives_sheet(mistakes, classes, columns=5, side=190):
    """The mistakes of one class, each a close-up: the wrong box and, in brackets, the objects that are labelled there.

    mistakes: as evaluate.false_positives gives them. Captions tell the kind and the score.
    """
    pictures = []
    for m in mistakes:
        part, (x, y) = close_up(m.example.image(), m.box)
        enlarge = side / max(part.shape[:2])
        near = [i for i, b in enumerate(m.example.boxes - (x, y, x, y))
                if b[0] < part.shape[1] and b[1] < part.shape[0] and b[2] > 0 and b[3] > 0]
        shown = np.concatenate([m.example.boxes[near], m.box[None]]) - (x, y, x, y)
        picture = boxes(part, shown, [*m.example.labels[near], m.label], classes, None, enlarge, [True] * len(near) + [False])
        square = Image.new("RGB", (side, side), "white")
        square.paste(picture)
        pictures.append(square)
    return sheet(pictures, columns, [f"{m.kind} {m.score:.2f}" for m in mistakes])


def false_positives(mistakes, classes, folder):
    """Write a sheet for every class that has mistakes into the folder: <number>_<class>.png. mistakes: {class name: [Mistake]}."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, (name, found) in enumerate(mistakes.items()):
        path = class_file(folder, k, name)
        path.unlink(missing_ok=True)                                # of an earlier evaluation of this run
        if found:
            save(false_positives_sheet(found, classes), path)


def class_file(folder, k, name):
    """Where the picture of class k goes: <k>_<name>.png, in letters and digits that every file system takes."""
    return folder / f"{k}_{''.join(c if c.isalnum() else '_' for c in name)[:50]}.png"


def save(picture, path):
    """Write a Pillow image or a matplotlib figure to path (its ending names the format), whole or not at all."""
    with files.whole(path) as part:
        (picture.save if isinstance(picture, Image.Image) else picture.savefig)(part)


def require():
    """Raise ImportError saying what to install if the curves cannot be drawn: before a long run, not after it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ImportError("draw.require: the curves need matplotlib: pip install 'tinydet[examples]'") from None


def plot(xlabel, ylabel, title):
    """A matplotlib figure and its axes, empty but for labels and a grid."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4.5), dpi=110, layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    return figure, axes


def loss_curves(records, names, path, title="training loss", what="loss"):
    """Draw the running mean of metrics over the steps. records: dicts with "step" and names, as train.Run logs them."""
    figure, axes = plot("step", f"{what} (mean of the last 25 steps)", title)
    steps = np.array([r["step"] for r in records])
    for name in names:
        values = np.cumsum([0.0, *(r[name] for r in records)])
        first = np.maximum(np.arange(len(steps)) - 24, 0)
        axes.plot(steps, (values[1:] - values[first]) / (np.arange(len(steps)) - first + 1), label=name)
    axes.set_ylim(bottom=0)
    axes.legend()
    save(figure, path)


def measurements(points, names, path):
    """Draw what was measured now and then while a net trained, one above the other. points: dicts with "step" and names; None is left out."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 2.6 * len(names)), dpi=110, layout="constrained")
    for axes, name in zip(figure.subplots(len(names), sharex=True, squeeze=False)[:, 0], names):
        values = np.array([np.nan if p[name] is None else p[name] for p in points], float)
        axes.plot([p["step"] for p in points], values, marker="o")
        axes.set(ylabel=name)
        known = values[np.isfinite(values)]
        if len(known) and np.ptp(known) < 1e-3 * abs(known).max():      # no zoom into roundings
            middle, half = known.mean(), abs(known).max() / 10
            axes.set_ylim(middle - half, middle + half)
        axes.grid(alpha=0.3)
    axes.set(xlabel="step")
    save(figure, path)


def profiles(drawn, path):
    """Draw AP as the score of one window moves, one window above the other, and what both pseudo-gradients make of it.

    drawn: {title: map_loss.Profile}. A staircase, AP; dotted, the score below which NMS suppresses the window; a diamond, where it is; the finite
    step, from score - delta to score + delta, and its slope; dashed, the four lines of the envelope, and its slope.
    """
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 3.2 * len(drawn)), dpi=110, layout="constrained")
    for axes, (title, p) in zip(figure.subplots(len(drawn), squeeze=False)[:, 0], drawn.items()):
        around = max(p.delta, min(p.reach, 6 * p.delta))
        low, high = p.score - 1.3 * around, p.score + 1.3 * around
        inside = (p.breakpoints > low) & (p.breakpoints < high)
        first = int(np.searchsorted(p.breakpoints, low, "right"))
        values = p.values[first:first + inside.sum() + 1]
        axes.stairs(values, [low, *p.breakpoints[inside], high], baseline=None, color="0.3", label="AP of the class")
        if low < p.blocker < high:
            axes.axvline(p.blocker, color="0.6", linestyle=":", label="NMS: suppressed below")
        ends = p.score + p.delta * np.array([-1, 1])
        below = p.values[np.searchsorted(p.breakpoints, ends[0])]
        axes.plot(ends, [below, below + 2 * p.delta * p.step], marker="o", color=COLOURS[0], label=f"finite step: slope {p.step:+.4f}")
        for k, slope in enumerate(p.lines):
            far = np.array([0, around if k < 2 else -around])
            axes.plot(p.score + far, p.now + slope * far, color=COLOURS[1], linestyle="--", linewidth=1,
                      label=None if k else f"envelope: slope {sum(p.lines) / 2:+.4f}")
        axes.plot([p.score], [p.now], marker="D", color="black", linestyle="", label="now")
        spread = max(np.ptp(values), 1e-3)
        axes.set(title=title, xlabel="score of the window", ylabel="AP", xlim=(low, high),
                 ylim=(values.min() - spread / 2, values.max() + spread / 2))
        axes.legend(fontsize="x-small")
        axes.grid(alpha=0.3)
    save(figure, path)


def precision_recall(results, path, title="precision and recall"):
    """Draw the curve of every class. results: as evaluate.voc returns them."""
    figure, axes = plot("recall", "precision", title)
    for i, (name, r) in enumerate(results.items()):
        axes.plot(np.concatenate([[0] * (len(r.recall) > 0), r.recall]), np.concatenate([r.precision[:1], r.precision]),
                  color=COLOURS[i % len(COLOURS)], label=f"{name} (AP {r.ap:.3f})")
    axes.set(xlim=(0, 1.01), ylim=(0, 1.03))
    axes.legend(loc="lower left")
    save(figure, path)
