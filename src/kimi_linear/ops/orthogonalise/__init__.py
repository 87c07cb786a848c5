"""Bring the singular values of matrices near one: the heart of the Muon optimizer."""

from kimi_linear.ops.orthogonalise.api import orthogonalise

__all__ = ["orthogonalise"]
