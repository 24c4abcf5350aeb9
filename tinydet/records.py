"""Example, the record that every reader returns, and what readers share: text, numbers, names and boxes that can be trusted."""
import collections
import dataclasses
import math
import os
import re
from pathlib import Path, PurePosixPath

import numpy as np

from tinydet import images
from tinydet.files import some

MOST_TEXT = 1 << 26                 # bytes of a text or annotation file: more is no such file
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Example:
    """One annotated image. boxes: (R, 4) float64, continuous pixels (x1, y1, x2, y2); labels: (R,) int64, an index into the
    data set's classes; difficult: (R,) bool, ignored in training and neither right nor wrong in evaluation.
    source: path of the image, or the image itself, uint8 (H, W, 3) or grey (H, W).
    tags: (T,) int64, labels of the whole image in a classification set; None where boxes say what is there.
    """

    name: str
    source: object
    size: tuple                     # (width, height)
    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray
    tags: np.ndarray = None

    def image(self):
        """The image, uint8 (H, W, 3) RGB. Raises ValueError if the file is no longer of the size that was read."""
        if not isinstance(self.source, (str, Path)):
            return self.source if self.source.ndim == 3 else np.repeat(self.source[..., None], 3, 2)
        image = images.cached(str(self.source))
        if image.shape[:2] != tuple(self.size[::-1]):
            raise ValueError(f"Example.image: {self.source} must be {self.size[0]}x{self.size[1]} as when it was read, got "
                             f"{image.shape[1]}x{image.shape[0]}")
        return image

    def usable(self):
        """boxes, labels that training uses: those that are not difficult."""
        return self.boxes[~self.difficult], self.labels[~self.difficult]

    def image_labels(self):
        """Labels of the image as a whole, (T,) int64: its tags, else the classes of its boxes, ascending, also of difficult ones."""
        return self.tags if self.tags is not None else np.unique(self.labels)


class DefectWarning(UserWarning):
    """What a reader dropped or changed. found: a dict of lists, the places of each kind of defect."""

    def __init__(self, message, found):
        super().__init__(message)
        self.found = found

    def __reduce__(self):
        return DefectWarning, (str(self), self.found)


def example(name, path, size, objects, index, defects):
    """An Example of objects (box, class, difficult, place). index: label of each class.

    An object that repeats one of the same class and corners is dropped and counted (CHOICE: it could only be found once).
    """
    kept = {}
    for box, c, difficult, place in objects:
        if (box, c) in kept:
            defects["repeated boxes dropped"].append(place)
        else:
            kept[box, c] = difficult
    return Example(name, path, size, np.array([box for box, _ in kept], float).reshape(-1, 4),
                   np.array([index[c] for _, c in kept], np.int64), np.array(list(kept.values()), bool))


NO_BOXES = np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0, bool)          # of tens of thousands of images: shared


def tagged(name, source, size, label):
    """An Example of a classification set: no boxes, `label` as its one tag."""
    return Example(name, source, size, *NO_BOXES, np.array([label], np.int64))


def fitted(box, size, defects, place, slack=0):
    """A box (x1, y1, x2, y2) cut at the border of the image, or None if it has no area there. A cut of more than slack is counted."""
    x1, y1, x2, y2 = (float(v) for v in box)
    if not (x2 > x1 and y2 > y1):
        defects["degenerate boxes dropped"].append(place)
        return None
    cut = max(x1, 0.0), max(y1, 0.0), min(x2, float(size[0])), min(y2, float(size[1]))
    if cut[2] <= cut[0] or cut[3] <= cut[1]:
        defects["boxes outside the image dropped"].append(place)
        return None
    if max(cut[0] - x1, cut[1] - y1, x2 - cut[2], y2 - cut[3]) > slack:
        defects["boxes cut at the border of the image"].append(place)
    return cut


def number(text):
    """The finite number that a text states in ASCII, else NaN (float() would take 1_000, inf and the digits of other scripts)."""
    value = float(text) if NUMBER.fullmatch(text) else math.nan
    return value if math.isfinite(value) else math.nan


def read_bytes(op, path):
    """The content of a file. Raises FileNotFoundError, or ValueError for what is no readable file or larger than MOST_TEXT."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{op}: there is no file {path}" + " (a folder has this name)" * os.path.isdir(path))
    try:
        with open(path, "rb") as f:
            content = f.read(MOST_TEXT + 1)
    except OSError as error:
        raise ValueError(f"{op}: {path} must be a readable file, got: {error}") from None
    if len(content) > MOST_TEXT:
        raise ValueError(f"{op}: {path} must not be larger than {MOST_TEXT} bytes, got more")
    return content


def read_lines(op, path):
    """Stripped lines of a UTF-8 text file of any system; empty ones stay, so that numbers of lines are right."""
    try:
        text = read_bytes(op, path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{op}: {path} must be UTF-8 text, got: {error}") from None
    if "\0" in text:
        raise ValueError(f"{op}: {path} must be UTF-8 text, got a NUL byte in line {text[:text.index(chr(0))].count(chr(10)) + 1}")
    return [line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]


def class_names(op, path):
    """Class names from a text file, one a line. Raises ValueError naming the line of an empty or repeated name."""
    names = read_lines(op, path)
    while names and not names[-1]:
        names.pop()
    if not names:
        raise ValueError(f"{op}: {path} must name at least one class, got none")
    for i, name in enumerate(names):
        if not name or not name.isprintable() or name in names[:i]:
            raise ValueError(f"{op}: {path} must name each class once, one a line, got {name!r} in line {i + 1}")
    return tuple(names)


def given_classes(op, classes):
    """The classes argument as a tuple; None stays. Raises ValueError unless they are distinct names."""
    if classes is None:
        return None
    if isinstance(classes, str) or not all(isinstance(c, str) and c for c in classes) or len(set(classes)) < len(list(classes)):
        raise ValueError(f"{op}: classes must be distinct names, got {classes!r}")
    return tuple(classes)


def inside(op, place, text):
    """A path that a file states, relative and below the folder it speaks of. Raises ValueError naming the place."""
    path = PurePosixPath(text.replace("\\", "/"))
    if not path.parts or path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", text) or not text.isprintable():
        raise ValueError(f"{op}: {place}: a path must be relative and stay in the folder, got {text[:200]!r}")
    return path


def no_split(op, folder, split, known):
    """The error that says which splits there are."""
    return FileNotFoundError(f'{op}: there is no split {split} in {folder}; splits here: {some(known)} (and "all")')


def each_once(op, owner, names):
    """The names. Raises ValueError if there is none, or one more than once."""
    if not names:
        raise ValueError(f"{op}: {owner} must name at least one image, got none")
    if twice := [n for n, count in collections.Counter(names).items() if count > 1]:
        raise ValueError(f"{op}: {owner} must name each image once, got {twice[0]} more than once")
    return names
