"""Measures the kernels. Run a script from the root of the repository: python -m bench.speed.kernels

Scripts write JSON to results/; publish/ alone makes tables and plots of it. bench/README.md has the map.
"""

import pathlib

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "bench/results"
