"""Images with boxes: one record for every source, the VOC folder reader, splits, and the crops that training sees."""
import collections
import dataclasses
import math
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

CACHE_BYTES = 1 << 30               # decoded images kept in memory


@dataclasses.dataclass(frozen=True)
class Example:
    """One annotated image. boxes: (R, 4) float64, continuous pixels (x1, y1, x2, y2); labels: (R,) int64, an index into the
    data set's classes; difficult: (R,) bool, ignored in training and neither right nor wrong in evaluation.
    source: path of the image, or the image itself, uint8 (H, W, 3).
    """

    name: str
    source: object
    size: tuple                     # (width, height)
    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray

    def image(self):
        """The image, uint8 (H, W, 3) RGB."""
        return _cached(str(self.source)) if isinstance(self.source, (str, Path)) else self.source

    def usable(self):
        """boxes, labels that training uses: those that are not difficult."""
        return self.boxes[~self.difficult], self.labels[~self.difficult]


def read_image(path):
    """Read any image file that Pillow reads as uint8 (H, W, 3) RGB. Raises FileNotFoundError, or ValueError naming the file."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):                  # 16 bits a pixel: Pillow would cut at 255, not scale
                image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
            elif "transparency" in image.info:              # of a palette: Pillow wants the detour
                image = image.convert("RGBA")
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise FileNotFoundError(f"data.read_image: there is no file {path}") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"data.read_image: {path} must be a readable image, got: {error}") from None


class _Cache(collections.OrderedDict):
    """Decoded images, the longest unused ones dropped beyond CACHE_BYTES."""

    size = 0

    def __call__(self, path):
        if path in self:
            self.move_to_end(path)
            return self[path]
        image = self[path] = read_image(path)
        self.size += image.nbytes
        while self.size > CACHE_BYTES and len(self) > 1:
            self.size -= self.popitem(last=False)[1].nbytes
        return image


_cached = _Cache()


# VOC folders

def read_voc(folder, split, classes=None):
    """Read a PASCAL VOC folder: Annotations/*.xml, JPEGImages/*, ImageSets/Main/<split>.txt.

    split: name of an image set; "all" reads every annotation. classes: names in label order; None derives them, sorted, from
    the boxes read. VOC counts pixels from 1 with both ends inside: (xmin - 1, ymin - 1, xmax, ymax) is the continuous box.
    A box with xmax <= xmin or ymax <= ymin is degenerate and dropped; one that leaves the image is cut at its border, and
    dropped if nothing is left. Both are counted in one warning.
    Returns a list of Example in the order of the image set, and the tuple of class names.
    Raises FileNotFoundError for missing files, ValueError naming file and place for what cannot be read or trusted.
    """
    folder, defects = Path(folder), collections.defaultdict(list)
    records = [_read_xml(folder, name, defects) for name in read_split(folder, split)]
    if classes is None:
        classes = sorted({label for record in records for label in record[4]})
    index, examples = {c: i for i, c in enumerate(classes)}, []
    for name, path, size, boxes, labels, difficult in records:
        if unknown := sorted(set(labels) - set(index)):
            raise ValueError(f"data.read_voc: {_xml(folder, name)}: the class of an object must be one of {', '.join(classes)}, "
                             f"got {', '.join(unknown)}")
        examples.append(Example(name, path, size, np.array(boxes, float).reshape(-1, 4),
                                np.array([index[c] for c in labels], np.int64), np.array(difficult, bool)))
    if defects:
        found = "; ".join(f"{len(where)} {what} (first in {where[0]})" for what, where in sorted(defects.items()))
        warnings.warn(f"data.read_voc: {folder}, {split}: {found}", stacklevel=2)
    return examples, tuple(classes)


def splits(folder):
    """Names of the image sets in a VOC folder: ImageSets/Main/*.txt, without the per-class lists `<class>_<split>`."""
    names = {p.stem for p in (Path(folder) / "ImageSets" / "Main").glob("*.txt")}
    return sorted(n for n in names if "_" not in n or n.rsplit("_", 1)[1] not in names)


def read_split(folder, split):
    """The image names of one set of a VOC folder, in file order ("all": every annotation, sorted)."""
    folder = Path(folder)
    if not (folder / "Annotations").is_dir():
        raise FileNotFoundError(f"data.read_split: a VOC folder must hold Annotations/, JPEGImages/ and ImageSets/Main/, got {folder}")
    if split == "all":
        names = sorted(p.stem for p in (folder / "Annotations").glob("*.xml"))
    else:
        path = folder / "ImageSets" / "Main" / f"{split}.txt"
        if not path.is_file():
            raise FileNotFoundError(f"data.read_split: there is no {path}; image sets here: {', '.join(splits(folder)) or 'none'} ("
                                    "and \"all\": every annotation)")
        names = [line.split()[0] for line in _text(path).splitlines() if line.strip()]
    if not names:
        raise ValueError(f"data.read_split: image set {split} of {folder} must name at least one image, got none")
    if twice := [n for n, count in collections.Counter(names).items() if count > 1]:
        raise ValueError(f"data.read_split: image set {split} of {folder} must name each image once, got {twice[0]} more than once")
    return names


def _text(path):
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"data.read_voc: {path} must be UTF-8 text, got: {error}") from None


def _xml(folder, name):
    return folder / "Annotations" / f"{name}.xml"


class _PlainXML(ElementTree.TreeBuilder):
    def doctype(self, name, pubid, system):
        raise ValueError("a document type, where entities are declared")


def _read_xml(folder, name, defects):
    """name, image path, (width, height), boxes, labels, difficult of one annotation file."""
    path = _xml(folder, name)
    if not path.is_file():
        raise FileNotFoundError(f"data.read_voc: there is no {path}")
    try:
        root = ElementTree.fromstring(path.read_bytes(), ElementTree.XMLParser(target=_PlainXML()))
    except (ElementTree.ParseError, LookupError, ValueError) as error:      # the last two: encodings that expat does not know
        raise ValueError(f"data.read_voc: {path} must be plain XML, got: {error}") from None
    image, size = _find_image(folder, name)
    tag = root.find("size")
    if tag is not None:
        claimed = tuple(_number(path, tag, side) for side in ("width", "height"))
        if claimed not in (size, (0, 0)):                           # 0x0: some converters write that for "unknown"
            raise ValueError(f"data.read_voc: {path}: <size> must be that of the image, {size[0]}x{size[1]}, "
                             f"got {claimed[0]:g}x{claimed[1]:g}")
    boxes, labels, difficult = [], [], []
    for item in root.iter("object"):
        box = item.find("bndbox")
        label = (item.findtext("name") or "").strip()
        if box is None or not label:
            raise ValueError(f"data.read_voc: {path}: each <object> must have a <name> and a <bndbox>, got one without")
        x1, y1, x2, y2 = (_number(path, box, corner) for corner in ("xmin", "ymin", "xmax", "ymax"))
        if x2 <= x1 or y2 <= y1:
            defects["degenerate boxes dropped"].append(name)
            continue
        cut = max(x1 - 1, 0), max(y1 - 1, 0), min(x2, size[0]), min(y2, size[1])
        if cut != (x1 - 1, y1 - 1, x2, y2):
            if cut[2] <= cut[0] or cut[3] <= cut[1]:
                defects["boxes outside the image dropped"].append(name)
                continue
            defects["boxes cut at the border of the image"].append(name)
        boxes.append(cut)
        labels.append(label)
        difficult.append((item.findtext("difficult") or "0").strip().lower() in ("1", "true"))
    return name, image, size, boxes, labels, difficult


def _number(path, tag, name):
    text = (tag.findtext(name) or "").strip()
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"data.read_voc: {path}: <{tag.tag}><{name}> must be a finite number, got {text!r}")
    return value


def _find_image(folder, name):
    """Path and (width, height) of an image of a VOC folder; only the file's header is read."""
    for ending in (f(e) for e in (".jpg", ".jpeg", ".png", ".bmp") for f in (str.lower, str.upper, str.title)):
        path = folder / "JPEGImages" / f"{name}{ending}"
        if path.is_file():
            try:
                with Image.open(path) as image:
                    return path, image.size
            except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise ValueError(f"data.read_voc: {path} must be a readable image, got: {error}") from None
    raise FileNotFoundError(f"data.read_voc: there is no {folder / 'JPEGImages' / name}.jpg (or .jpeg, .png)")


# Splitting

def hold_out(examples, fraction, seed=0):
    """Split off a seeded part for validation: returns (rest, held out), each in the order given.

    Near-identical images (256-bit difference hash, at most 20 bits apart) stay on one side: consecutive shots of a scene
    would make the held-out figure too good. The part is the first that holds round(fraction * len(examples)) images.
    Raises ValueError unless 0 < fraction < 1 and both parts get an image.
    """
    groups = near_identical(examples)
    wanted, held = round(fraction * len(examples)), set()
    for group in np.random.default_rng(seed).permutation(len(groups)):
        if len(held) >= wanted:
            break
        held.update(groups[group])
    if not 0 < len(held) < len(examples):
        raise ValueError(f"data.hold_out: both parts must hold an image, got fraction {fraction} of {len(examples)} images "
                         f"in {len(groups)} groups")
    return [e for i, e in enumerate(examples) if i not in held], [e for i, e in enumerate(examples) if i in held]


def near_identical(examples, bits=20):
    """Groups (lists of indices) of examples whose difference hashes are linked by steps of at most `bits` of 256 bits."""
    hashes = np.array([_difference_hash(e.image()) for e in examples]).reshape(len(examples), 256)
    group = np.arange(len(examples))
    for i, h in enumerate(hashes):
        for j in np.flatnonzero((hashes[:i] != h).sum(1) <= bits):
            group[group == group[j]] = group[i]
    return [list(np.flatnonzero(group == g)) for g in dict.fromkeys(group)]


def _difference_hash(image):
    small = np.asarray(Image.fromarray(image).convert("L").resize((17, 16), Image.Resampling.BILINEAR), int)
    return (small[:, 1:] > small[:, :-1]).ravel()


# What a net sees of an image

def view(image, left, top, scale, width, height, fill):
    """Cut and resize in one step (bilinear, antialiased): width x height pixels of the image enlarged `scale` times.

    Pixel (0, 0) of the result lies at (left, top) in the image; what lies outside the image is `fill`.
    image: uint8 (H, W, 3). Returns uint8 (height, width, 3).
    """
    H, W = image.shape[:2]
    x0, x1 = max(0, math.ceil(-left * scale - 1e-6)), min(width, math.floor((W - left) * scale + 1e-6))
    y0, y1 = max(0, math.ceil(-top * scale - 1e-6)), min(height, math.floor((H - top) * scale + 1e-6))
    out = np.full((height, width, 3), fill, np.uint8)
    if x1 > x0 and y1 > y0:
        box = np.array([left + x0 / scale, top + y0 / scale, left + x1 / scale, top + y1 / scale]).clip(0, (W, H, W, H))
        piece = Image.fromarray(image).resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR, box=tuple(box))
        out[y0:y1, x0:x1] = np.asarray(piece)
    return out


def flip(image, boxes):
    """Mirror an image (H, W, 3) left to right, and its boxes (R, 4) with it: (x1, x2) -> (W - x2, W - x1)."""
    return image[:, ::-1], np.stack([image.shape[1] - boxes[:, 2], boxes[:, 1], image.shape[1] - boxes[:, 0], boxes[:, 3]], 1)


def mean_std(examples, most=50):
    """Scalar mean and standard deviation of the pixels (0..255) of the first `most` images, for normalising as OverFeat did."""
    pixels = np.concatenate([e.image()[::4, ::4].ravel() for e in examples[:most]]).astype(np.float64)
    return float(pixels.mean()), max(1.0, float(pixels.std()))
