"""Sources of a model's tensors: safetensors files, or `load_format: dummy`."""
