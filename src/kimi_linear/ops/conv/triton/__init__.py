"""The short convolution on a GPU, in Triton. Only `backend` may be imported without triton."""
