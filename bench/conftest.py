import machine


def pytest_benchmark_update_machine_info(machine_info):
    import torch

    machine_info |= machine.describe("cuda" if torch.cuda.is_available() else "cpu")
