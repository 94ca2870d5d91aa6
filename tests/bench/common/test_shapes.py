"""Contract: the shapes that are written down are those that transformers builds from the same numbers, in its order,
and have the published numbers of parameters."""

import math

import pytest
import torch

from bench.common import shapes

PUBLISHED = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-7B": 7_615_616_512,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
}


@pytest.mark.parametrize("model", shapes.MODELS)
def test_shapes_are_those_of_the_model(model):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(shapes.config(model))
    written = shapes.parameter_shapes(model)
    assert [(name, tuple(p.shape)) for name, p in built.named_parameters()] == list(written.items())
    if model in PUBLISHED:
        assert sum(map(math.prod, written.values())) == PUBLISHED[model]
