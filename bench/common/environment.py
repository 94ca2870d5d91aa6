"""What a measurement was taken on, part of every result file; and what the GPU's sensors say while it runs."""

import os
import platform
import subprocess

import torch

import es_kernels
from bench import ROOT


def describe(device):
    """Facts about machine, versions and commit, as JSON: a figure means nothing without them. None is unknown."""
    with open("/proc/cpuinfo") as f:
        processor = next(
            (line.split(":")[1].strip() for line in f if line.startswith("model name")), platform.processor()
        )
    facts = {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    facts |= {"es_kernels": es_kernels.__version__, "commit": _commit()}
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "sms": properties.multi_processor_count, "l2_bytes": properties.L2_cache_size}
        facts |= {"capability": f"sm_{properties.major}{properties.minor}", "memory_bytes": properties.total_memory}
        facts |= {"triton": _triton(), "cuda": torch.version.cuda, **Sensors(device).limits()}
    return facts


def slug(facts):
    """The machine in the name of a result file: "cpu", or the GPU's name as "nvidia-h200"."""
    return facts["gpu"].lower().replace(" ", "-") if "gpu" in facts else "cpu"


def _triton():
    """Its version by the module itself: torch's own builds of it are registered under other names, or under none."""
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _commit():
    """The commit measured, with a + if files differ from it; None without git, or in sources that are no repository
    (though in a folder that is one)."""
    command = [
        "git",
        f"--git-dir={ROOT / '.git'}",
        f"--work-tree={ROOT}",
        "describe",
        "--always",
        "--abbrev=12",
        "--dirty=+",
    ]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


class Sensors:
    """Clocks, power and energy of a GPU by NVML; without nvidia-ml-py (or with a driver that keeps them to itself)
    every reading is None."""

    def __init__(self, device):
        self.nvml = self.handle = None
        try:
            import pynvml

            pynvml.nvmlInit()
            self.handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            self.nvml = pynvml
        except Exception:  # no package, no driver, no rights: each has an error type of its own
            pass

    def _read(self, name, *arguments):
        try:
            return getattr(self.nvml, name)(self.handle, *arguments)
        except Exception:
            return None

    def limits(self):
        driver, watts = self._driver(), self._read("nvmlDeviceGetEnforcedPowerLimit")
        return {
            "driver": driver,
            "max_sm_mhz": self._read("nvmlDeviceGetMaxClockInfo", 1),
            "power_limit_watts": watts and watts / 1000,
        }

    def _driver(self):
        try:
            return self.nvml.nvmlSystemGetDriverVersion()
        except Exception:
            return None

    def now(self):
        """{sm_mhz, memory_mhz, watts} at this moment."""
        watts = self._read("nvmlDeviceGetPowerUsage")
        return {
            "sm_mhz": self._read("nvmlDeviceGetClockInfo", 1),
            "memory_mhz": self._read("nvmlDeviceGetClockInfo", 2),
            "watts": watts and watts / 1000,
        }

    def joules(self):
        """Energy since the driver was loaded."""
        millijoules = self._read("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1000
