"""Causal language models: loaded, named as their checkpoint names them, and saved."""

# What weights can be loaded as; "auto" is the checkpoint's own. Here, for a check of options imports no torch.
WEIGHT_DTYPES = ("auto", "float32", "bfloat16", "float16")
