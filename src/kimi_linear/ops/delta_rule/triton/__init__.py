"""The delta rule on a GPU, in Triton. Only `backend` may be imported without triton; README.md explains the kernels."""
