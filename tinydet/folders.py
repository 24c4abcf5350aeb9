"""Folders of images by class: <class>/*.jpg, or <split>/<class>/*.jpg. Users call data.read_folders."""
import collections
import os
from pathlib import Path

from tinydet import images
from tinydet.records import given_classes, no_split, some, tagged

ANNOTATIONS = (".json", ".txt", ".xml")
NO_CLASSES = ("images", "labels", "annotations", "jpegimages", "obj_train_data", "data")    # folders of sets with boxes
LOOKS_LIKE = f"<class>/*.jpg or <split>/<class>/*.jpg, no annotations ({', '.join(ANNOTATIONS)}) among them (image folders)"


def _below(folder):
    return sorted(p for p in Path(folder).iterdir() if p.is_dir() and not p.name.startswith(".")) if os.path.isdir(folder) else []


def _holds_images(folder):
    with os.scandir(folder) as entries:
        return any(os.path.splitext(e.name)[1].lower() in images.ENDINGS for e in entries)


def _has_boxes(folder):
    """Is it of a set with boxes, by its name or by annotations beside its images?"""
    return folder.name.lower() in NO_CLASSES or _holds_images(folder) and any(
        p.suffix.lower() in ANNOTATIONS and not p.name.startswith(".") for p in folder.iterdir())


def found(folder):
    """Whether a folder holds folders of images, and no annotations among them."""
    below = _below(folder)
    every = below + [q for p in below for q in _below(p)]
    return any(map(_holds_images, every)) and not any(map(_has_boxes, every))


def _is_split(folder):
    """Class folders hold images, split folders only class folders."""
    flat, deep = _holds_images(folder), any(map(_holds_images, _below(folder)))
    if flat and deep:
        raise ValueError(f"data.read_folders: {folder} must hold images (a class) or folders of images (a split), got both")
    return deep


def splits(folder):
    """Names of the split folders: sub-folders that hold class folders."""
    return [p.name for p in _below(folder) if _is_split(p)]


def read(folder, split, classes=None):
    """Examples, classes, and defects (a dict of lists of places): see data.read_folders."""
    folder, defects, classes = Path(folder), collections.defaultdict(list), given_classes("data.read_folders", classes)
    if not found(folder):
        raise FileNotFoundError(f"data.read_folders: a folder must hold {LOOKS_LIKE}, got {folder}")
    parts = splits(folder)
    if alone := [p.name for p in _below(folder) if parts and p.name not in parts and _holds_images(p)]:
        raise ValueError(f"data.read_folders: {folder} must hold either classes or splits, got class {alone[0]} beside split "
                         f"{parts[0]}")
    if split != "all" and split not in parts:
        raise no_split("data.read_folders", folder, split, parts)
    every = [folder / p for p in parts] or [folder]
    names = sorted({p.name for part in every for p in _below(part)})
    index, examples = {c: i for i, c in enumerate(classes or names)}, []
    if unknown := [n for n in names if n not in index]:
        raise ValueError(f"data.read_folders: {folder}: a class folder must be one of {some(classes)}, got {some(unknown)}")
    for part in every if split == "all" else [folder / split]:
        for below in _below(part):
            pictures = images.in_folder("data.read_folders", below)
            for path in sorted(below.iterdir()):
                if path not in pictures.values() and not path.name.startswith("."):
                    defects["files that are no images passed over"].append(str(path.relative_to(folder)))
            for stem, path in pictures.items():
                size = images.header("data.read_folders", path, defects)
                name = f"{below.relative_to(folder).as_posix()}/{stem}"
                examples.append(tagged(name, path, size, index[below.name]))
    return examples, tuple(index), defects
