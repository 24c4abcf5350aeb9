"""YOLO folders: one text file of relative boxes beside each image. Users call data.read_yolo."""
import collections
import math
import os
from pathlib import Path

from tinydet import images
from tinydet.records import class_names, each_once, example, fitted, given_classes, inside, no_split, number, read_lines, some

LOOKS_LIKE = "labels/ beside images/, or <split>/labels (YOLO)"
LISTS = ("train", "trainval", "val", "valid", "test")               # <split>.txt beside images/; others may be anything
SPARE = 0.01                        # by which rounding may leave 0..1; beyond it the numbers are pixels
SLACK = 1.0                         # pixels that rounding may put a corner outside the image


def found(folder):
    """Whether a folder holds label folders where a YOLO set has them."""
    return bool(_folders(folder))


def _folders(folder):
    """Folders that hold the images of a part, with their label folders: {"": images/} or {split: images/split or split/images}."""
    folder = Path(folder)
    if os.path.isdir(folder / "labels"):
        inner = [p for p in (folder / "images", folder / "labels") if os.path.isdir(p)]
        names = sorted({p.name for part in inner for p in part.iterdir() if p.is_dir() and not p.name.startswith(".")})
        pairs = {n: (folder / "images" / n, folder / "labels" / n) for n in names}
        if not names or images.in_folder("data.read_yolo", folder / "images") or _label_files(folder / "labels", False):
            pairs[""] = folder / "images", folder / "labels"
        return pairs
    parts = sorted(folder.iterdir()) if os.path.isdir(folder) else []
    return {p.name: (p / "images", p / "labels") for p in parts if os.path.isdir(p / "labels")}


def _lists(folder):
    """Split lists: sets/*.txt, else train.txt, val.txt and the like in the folder itself."""
    folder = Path(folder)
    return {p.stem: p for p in sorted((folder / "sets").glob("*.txt"))} or {
        n: folder / f"{n}.txt" for n in LISTS if os.path.isfile(folder / f"{n}.txt")}


def splits(folder):
    """Names of the split lists, else of the split folders."""
    return sorted(_lists(folder) or (n for n in _folders(folder) if n))


def read(folder, split, classes=None):
    """Examples, classes, and defects (a dict of lists of places): see data.read_yolo."""
    folder, defects, classes = Path(folder), collections.defaultdict(list), given_classes("data.read_yolo", classes)
    pairs, lists = _folders(folder), _lists(folder)
    if not pairs:
        raise FileNotFoundError(f"data.read_yolo: a YOLO folder must hold {LOOKS_LIKE}, got {folder}")
    files = _class_files(folder)
    if len(files) > 1:
        raise ValueError(f"data.read_yolo: {folder} must hold one file of class names, got {some(p.name for p in files)}")
    names = class_names("data.read_yolo", files[0]) if files else classes
    if names is None:
        raise FileNotFoundError(f"data.read_yolo: there is no {folder / 'classes.txt'} (or labels/classes.txt, or *.names): class "
                                "names, one a line, as in `names` of a data.yaml; or give classes")
    classes = classes or names
    if split in lists:
        found = _listed(folder, lists[split], pairs)
    elif split == "all" or split and split in pairs:
        parts = {part: _part(part, *pairs[part]) for part in sorted(pairs)}     # all: a label file may lie in a wrong one
        found = {name: both for part in parts if split in ("all", part) for name, both in parts[part].items()}
    else:
        raise no_split("data.read_yolo", folder, split, splits(folder))
    if not found:
        raise ValueError(f"data.read_yolo: split {split} of {folder} must hold at least one image, got none")
    index, examples = {c: i for i, c in enumerate(classes)}, []
    for name, (image, label) in found.items():
        size = images.header("data.read_yolo", image, defects)
        if os.path.lexists(label):
            objects = _read_label(label, size, names, index, defects)
        else:
            objects = []
            defects["images without a label file, taken as images without objects"].append(name)
        examples.append(example(name, image, size, objects, index, defects))
    return examples, classes, defects


def _class_files(folder):
    files = [folder / "classes.txt", folder / "labels" / "classes.txt", *sorted(folder.glob("*.names"))]
    return [p for p in files if os.path.isfile(p)]


def _part(part, image_folder, label_folder):
    """Image and label file of every image of a part, by name. Raises FileNotFoundError for a label file without image."""
    pictures = _pictures(part, image_folder, label_folder)
    labels = {label for _, label in pictures.values()}
    for path in _label_files(label_folder, bool(part)):
        if path not in labels:
            place = image_folder / path.relative_to(label_folder).with_suffix("")
            raise FileNotFoundError(f"data.read_yolo: {path} must belong to an image, but there is no {place}.jpg (or "
                                    f"{', '.join(images.ENDINGS[1:])})")
    return pictures


def _pictures(part, image_folder, label_folder):
    """Image and label file of every image of a part, by name; those of a split also in folders below its own."""
    found = {}
    for below in _with_folders_below(image_folder) if part else [image_folder]:
        label_place = label_folder / below.relative_to(image_folder)
        for stem, path in images.in_folder("data.read_yolo", below).items():
            found[(Path(part) / below.relative_to(image_folder) / stem).as_posix()] = path, label_place / f"{stem}.txt"
    return found


def _label_files(folder, deep):
    places = _with_folders_below(folder) if deep else [folder]
    return [p for place in places for p in sorted(place.glob("*.txt")) if p.name != "classes.txt"]


def _with_folders_below(folder):
    return [folder, *(p for p in sorted(folder.rglob("*"))
                      if p.is_dir() and not any(name.startswith(".") for name in p.relative_to(folder).parts))]


def _listed(folder, path, pairs):
    """Image and label file of every line of a split list: a name below images/, or the path of an image."""
    every = {}
    for part in pairs:
        every |= _pictures(part, *pairs[part])
    by_path, names = {p: name for name, (p, _) in every.items()}, []
    for i, line in enumerate(read_lines("data.read_yolo", path)):
        if line:
            entry = inside("data.read_yolo", f"{path}, line {i + 1}", line)
            name = by_path.get(folder / entry, by_path.get(folder / "images" / entry, str(entry)))
            if name not in every:
                raise FileNotFoundError(f"data.read_yolo: {path}, line {i + 1}: there is no image {line[:200]} in "
                                        f"{some(pairs[p][0] for p in pairs)}")
            names.append(name)
    return {name: every[name] for name in each_once("data.read_yolo", path, names)}


def _read_label(path, size, names, index, defects):
    """Objects (box, class, difficult, place) of a label file: class x_centre y_centre width height, relative to the image."""
    objects = []
    for i, line in enumerate(read_lines("data.read_yolo", path)):
        where, fields = f"{path}, line {i + 1}", line.split()
        if not fields:
            continue
        if len(fields) != 5:
            what = f"{len(fields)}" + " (is the last a confidence? these are detections then, no annotations)" * (len(fields) == 6)
            what = f"a polygon of {(len(fields) - 1) // 2} points" if len(fields) > 6 and len(fields) % 2 else what
            raise ValueError(f"data.read_yolo: {where}: a line must hold class, x_centre, y_centre, width, height, got {what}")
        if not (fields[0].isascii() and fields[0].isdigit() and len(fields[0]) < 10 and int(fields[0]) < len(names)):
            raise ValueError(f"data.read_yolo: {where}: the class must be one of 0..{len(names) - 1}, got {fields[0][:80]}")
        values = [number(f) for f in fields[1:]]
        if any(math.isnan(v) for v in values):
            raise ValueError(f"data.read_yolo: {where}: a box must be finite numbers, got {line[:200]}")
        if min(values) < -SPARE or max(values) > 1 + SPARE:
            raise ValueError(f"data.read_yolo: {where}: a box must be relative to the image, 0..1, got {line[:200]}")
        if (c := names[int(fields[0])]) not in index:
            raise ValueError(f"data.read_yolo: {where}: the class must be one of {some(index)}, got {c}")
        (x, y, w, h), (W, H), place = values, size, f"{path.name}, line {i + 1}"
        if cut := fitted(((x - w / 2) * W, (y - h / 2) * H, (x + w / 2) * W, (y + h / 2) * H), size, defects, place, SLACK):
            objects.append((cut, c, False, place))
    return objects
