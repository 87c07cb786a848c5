"""Linear cross entropy with a Triton kernel for a chunk. Only `backend` may be imported without triton."""
