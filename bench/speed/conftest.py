import torch

from bench.common import environment


def pytest_benchmark_update_machine_info(machine_info):
    machine_info |= environment.describe("cuda" if torch.cuda.is_available() else "cpu")
