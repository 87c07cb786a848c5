"""What the Triton kernels of all operators share. Only `backend` may be imported without triton."""
