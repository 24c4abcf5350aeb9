"""Where the CUDA kernels lie and what their text is. Compiling and launching them is not built yet."""
from pathlib import Path

_here = Path(__file__).resolve().parent
KERNELS = _here / "kernels" if (_here / "kernels").is_dir() else _here.parent / "kernels"       # installed, else in the repository


def source(name):
    """Text of the kernel file `name`, such as "max_pool.cu". Raises ValueError naming those that exist."""
    there = sorted(p.name for p in KERNELS.glob("*") if p.suffix in (".cu", ".h"))
    if name not in there:
        raise ValueError(f"cuda.source: name must be one of {', '.join(there) or 'no file at all'} in {KERNELS}, got {name!r}")
    return (KERNELS / name).read_text(encoding="utf-8")
