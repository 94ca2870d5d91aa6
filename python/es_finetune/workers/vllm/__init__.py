"""The engine over vLLM: engine.py in the run's process, extension.py in vLLM's own."""
