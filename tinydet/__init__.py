"""tinydet: how convolutional object detection is trained, as plain arrays with explicit forward and backward."""
import os
import sys

# Threads of OpenBLAS (products) and OpenMP (Numba loops) spin while they wait for work, and so slow down each other, and any
# other program on the machine, many times over. These settings make them sleep. They are read when NumPy and Numba start
# their threads: import tinydet before numpy to get both.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "numpy" not in sys.modules:
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

from tinydet.backend import array_module, pick, to_numpy, use  # noqa: E402

__version__ = "0.1.0"
__all__ = ["array_module", "pick", "to_numpy", "use"]
