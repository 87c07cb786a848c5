"""Checkpoints in and out: the released layout in safetensors, checked by name, shape and dtype, written atomically."""
