import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import machine


def pytest_benchmark_update_machine_info(machine_info):
    machine_info |= machine.describe("cuda" if torch.cuda.is_available() else "cpu")
