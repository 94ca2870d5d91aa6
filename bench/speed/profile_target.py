"""The two main kernels at a size that fills a GPU, twice, for a profiler: f32 base -> bf16 with one seed, and an f32
update with 30."""

import torch

from es_kernels import ParamTable, add_noise_

live = ParamTable({"w": torch.zeros(1 << 28, dtype=torch.bfloat16, device="cuda")})
master = ParamTable({"w": torch.randn(1 << 28, device="cuda")})
for _ in range(2):
    add_noise_(live, 1, 1e-3, master)
    add_noise_(master, list(range(30)), [1e-3] * 30)
torch.cuda.synchronize()
