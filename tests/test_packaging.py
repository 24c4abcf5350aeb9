import os
import pkgutil
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import tinydet
import tinydet.ops

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the source tree")


def files(folder):
    """Every file below a folder of the source tree, by its path from the root, without what Python, Numba and editors leave behind."""
    found = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*") if p.is_file()}
    return {n for n in found if "__pycache__" not in n and not any(part.startswith(".") for part in n.split("/"))}


def sources():
    return {n for n in files("tinydet") if n.endswith(".py")}


def kernels():
    return {f"tinydet/{n}" for n in files("kernels")}


def run(*command, **options):
    """Run a command without PYTHONPATH or bytecode, return what it prints."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")} | options.pop("env", {})
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=200, env=env, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def needs(package, least, why):
    """Skip unless the package is installed in this version or a newer one."""
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        version = "0.0"
    if tuple(map(int, version.split(".")[:2])) < least:
        pytest.skip(f"{why} needs {package} {least[0]}.{least[1]} or newer (pip install -U {package}), got {version}")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the source tree, in which a build may leave files behind."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    for name in ("tinydet", "kernels", "tests", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    return folder


def build(copy, kind):
    needs("setuptools", (70, 1), f"building the {kind}")            # the first that needs no package "wheel"
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}('dist'))"
    return copy / "dist" / run(sys.executable, "-c", code, cwd=copy).splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(copy):
    """The wheel, built without a network by the setuptools that is installed."""
    return build(copy, "wheel")


@pytest.fixture(scope="module")
def sdist(copy):
    return build(copy, "sdist")


def test_the_wheel_holds_the_package_and_the_kernels_and_nothing_else(copy, wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        assert names == sources() | kernels() and "tinydet/kernels/max_pool.cu" in names
        assert {n.rsplit("/", 1)[0] for n in names} == {"tinydet", "tinydet/ops", "tinydet/models", "tinydet/kernels"}
        for name in names:
            origin = copy / (name.removeprefix("tinydet/") if name.startswith("tinydet/kernels/") else name)
            assert archive.read(name) == origin.read_bytes()


def test_the_sdist_holds_what_the_wheel_is_built_from(copy, sdist, wheel, tmp_path):
    """The packages, the kernels and, as setuptools does it, tests/test_*.py; to run the tests, take the repository."""
    top = f"tinydet-{tinydet.__version__}"
    assert sdist.name == f"{top}.tar.gz"
    with tarfile.open(sdist) as archive:
        found = {m.name.removeprefix(top + "/"): archive.extractfile(m).read() for m in archive if m.isfile()}
        archive.extraction_filter = getattr(tarfile, "data_filter", None)       # Pythons before 3.10.12 and 3.11.4 have none
        archive.extractall(tmp_path)
    made = {n for n in found if n.startswith("tinydet.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    tests = {n for n in files("tests") if n.startswith("tests/test_")}
    assert found.keys() - made == {"pyproject.toml", "README.md"} | sources() | files("kernels") | tests
    for name in found.keys() - made:
        assert found[name] == (copy / name).read_bytes()
    with zipfile.ZipFile(build(tmp_path / top, "wheel")) as again, zipfile.ZipFile(wheel) as first:
        assert {n: again.read(n) for n in again.namelist()} == {n: first.read(n) for n in first.namelist()}


def test_the_wheel_says_what_it_is_and_needs(wheel):
    assert wheel.name == f"tinydet-{tinydet.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        told = archive.read(f"tinydet-{tinydet.__version__}.dist-info/METADATA").decode().splitlines()
    for line in ("Name: tinydet", f"Version: {tinydet.__version__}", "Requires-Python: >=3.10", "Provides-Extra: examples",
                 "Provides-Extra: test", "Description-Content-Type: text/markdown"):
        assert line in told
    needed = {line.split()[1].split(">")[0] for line in told if line.startswith("Requires-Dist") and "extra" not in line}
    assert needed == {"numpy", "scipy", "numba", "pillow"}


# Finding the kernels

ASK = ("import pathlib, sys, tinydet.data, tinydet.scenes, tinydet.evaluate; from tinydet import cuda; "
       "print(pathlib.Path(tinydet.__file__).parent, cuda.KERNELS, cuda.source('max_pool.cu'), sep='\\n', end='')")


def ask(python, tmp_path, **env):
    """Where a Python, started elsewhere, finds the package and the kernels, and that it reads one."""
    package, folder, text = run(python, "-c", ASK, cwd=tmp_path, env=env).split("\n", 2)
    assert text == (ROOT / "kernels" / "max_pool.cu").read_text()
    return Path(package), Path(folder)


@pytest.fixture
def environment(tmp_path):
    """The Python of a new virtual environment, and its folder of packages. It sees those installed here, but no editable ones."""
    needs("pip", (22, 3), "installing into another environment")
    needs("setuptools", (70, 1), "installing into another environment")
    venv.create(tmp_path / "venv")                                  # without pip
    python = tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    folders = dict.fromkeys(str(metadata.distribution(name).locate_file("")) for name in ("setuptools", "numpy", "pillow"))
    (site / "others.pth").write_text("".join(f"{f}\n" for f in folders))     # .pth files in these are not read
    return python, site


def install(python, *what):
    run(sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install", "-q", "--no-index", "--no-deps",
        "--no-build-isolation", "--force-reinstall", *what)


def test_a_kernel_is_found_from_the_installed_wheel(wheel, environment, tmp_path):
    python, site = environment
    install(python, wheel)
    assert ask(python, tmp_path) == (site / "tinydet", site / "tinydet" / "kernels")


def test_a_kernel_is_found_from_an_editable_install(copy, environment, tmp_path):
    python, _ = environment
    install(python, "-e", copy)
    assert ask(python, tmp_path) == (copy / "tinydet", copy / "kernels")


def test_a_kernel_is_found_from_a_plain_checkout(copy, tmp_path):
    assert ask(sys.executable, tmp_path, PYTHONPATH=str(copy)) == (copy / "tinydet", copy / "kernels")


# The tree

def stems(package):
    return {m.name for m in pkgutil.iter_modules(package.__path__)}


def test_every_op_has_its_test_file():
    assert len(stems(tinydet.ops)) > 5
    assert [s for s in sorted(stems(tinydet.ops)) if not (ROOT / "tests" / f"test_{s}.py").is_file()] == []


def test_every_kernel_belongs_to_an_op():
    assert {p.stem for p in (ROOT / "kernels").glob("*.cu")} <= stems(tinydet.ops) | {"sgd"}      # of optim.py


def test_every_package_is_listed():
    """pyproject names the packages one by one: a new folder that is not listed would be missing from the wheel."""
    text = (ROOT / "pyproject.toml").read_text()
    for folder in {p.parent for p in (ROOT / "tinydet").rglob("*.py")}:
        assert f'"{".".join(folder.relative_to(ROOT).parts)}"' in text
        assert (folder / "__init__.py").is_file()
