import os
import pkgutil
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import tinydet
import tinydet.ops

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the source tree")


def sources():
    return {p.relative_to(ROOT).as_posix() for p in (ROOT / "tinydet").rglob("*.py")}


def kernels():
    return {f"tinydet/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "kernels").iterdir() if p.is_file() and not p.name.startswith(".")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the tree, built without a network by the setuptools that is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    for name in ("tinydet", "kernels", "tests", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    try:
        version = metadata.version("setuptools")
    except metadata.PackageNotFoundError:
        version = "0.0"
    if tuple(map(int, version.split(".")[:2])) < (70, 1):           # the first that needs no package "wheel"
        pytest.skip(f"building a wheel needs setuptools 70.1 or newer (pip install -U setuptools), got {version}")
    code = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 0, done.stderr
    return folder / "dist" / done.stdout.splitlines()[-1]


def test_the_wheel_holds_the_package_and_the_kernels_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        assert names == sources() | kernels()
        assert {n.rsplit("/", 1)[0] for n in names} == {"tinydet", "tinydet/ops", "tinydet/models", "tinydet/kernels"}
        for name in names:
            origin = ROOT / (name.removeprefix("tinydet/") if name.startswith("tinydet/kernels/") else name)
            assert archive.read(name) == origin.read_bytes()


def test_the_wheel_says_what_it_is_and_needs(wheel):
    assert wheel.name == f"tinydet-{tinydet.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        told = archive.read(f"tinydet-{tinydet.__version__}.dist-info/METADATA").decode().splitlines()
    for line in ("Name: tinydet", f"Version: {tinydet.__version__}", "Requires-Python: >=3.10", "Provides-Extra: examples",
                 "Provides-Extra: test", "Description-Content-Type: text/markdown"):
        assert line in told
    needed = {line.split()[1].split(">")[0] for line in told if line.startswith("Requires-Dist") and "extra" not in line}
    assert needed == {"numpy", "scipy", "numba", "pillow"}


def test_the_wheel_imports_from_where_it_is_installed(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import tinydet, tinydet.data, tinydet.scenes, tinydet.evaluate; print(tinydet.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == tmp_path / "tinydet" / "__init__.py"


def stems(package):
    return {m.name for m in pkgutil.iter_modules(package.__path__)}


def test_every_op_has_its_test_file():
    assert len(stems(tinydet.ops)) > 5
    assert [s for s in sorted(stems(tinydet.ops)) if not (ROOT / "tests" / f"test_{s}.py").is_file()] == []


def test_every_kernel_belongs_to_an_op():
    assert {p.stem for p in (ROOT / "kernels").glob("*.cu")} <= stems(tinydet.ops)


def test_every_package_is_listed():
    """pyproject names the packages one by one: a new folder that is not listed would be missing from the wheel."""
    text = (ROOT / "pyproject.toml").read_text()
    for folder in {p.parent for p in (ROOT / "tinydet").rglob("*.py")}:
        assert f'"{".".join(folder.relative_to(ROOT).parts)}"' in text
        assert (folder / "__init__.py").is_file()
