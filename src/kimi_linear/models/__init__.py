"""Whole networks: configuration, presets, the module, and the names of its tensors in a released checkpoint."""
