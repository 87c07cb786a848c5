"""Measuring a model: bits per byte of held-out text, and what decoding costs. Nothing here trains or generates."""
