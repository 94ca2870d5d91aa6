"""Counter-based Philox noise, made inside the kernel and added straight into parameter memory.

    add_noise_      perturb, restore, swap, update: the one operation, over a tensor or a whole model
    ParamTable      named parameters, ready for the kernels
    NamedTensor     an entry of it: (name, tensor, segments)
    factors         L and R of the noise of low rank, for engines that answer for many members at once
    fingerprint     64 bits that prove two sets of weights equal
    noise           the definition of the noise, in NumPy
    backend         `with es_kernels.backend("reference"):` overrides the choice of implementation

`python -m es_kernels` tells what is installed, which backend serves, and why.
"""

from . import noise
from .backends import active_backend, backend
from .ops import add_noise_, factors, fingerprint
from .segment import Segment
from .table import NamedTensor, ParamTable

__version__ = "0.1.0"
__all__ = [
    "NamedTensor",
    "ParamTable",
    "Segment",
    "active_backend",
    "add_noise_",
    "backend",
    "factors",
    "fingerprint",
    "noise",
]
