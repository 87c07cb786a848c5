"""Absorbed MLA decode as Triton kernels. Only `backend` may be imported without triton."""
