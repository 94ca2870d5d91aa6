"""`pytest -p tests.es_kernels.sanitized.plugin`: es_kernels loads the library that run.sh built, not its own."""

import pathlib

from es_kernels import native

LIBRARIES = pathlib.Path(__file__).parents[3] / "build/address/es_kernels"

native.path = lambda name: LIBRARIES / f"libes_{name}.so"
