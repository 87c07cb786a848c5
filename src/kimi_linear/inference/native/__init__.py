"""Inference of whole models in native code: packed weights, one call a token."""
