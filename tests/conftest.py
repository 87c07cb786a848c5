"""One thread for every test: the shapes are tiny, and test workers share the machine's cores."""

import os

import torch
from hypothesis import settings

torch.set_num_threads(1)
# For fuzzing by hand, with fresh random cases: pytest tests/checkpoint/test_fuzz.py --hypothesis-profile=long
settings.register_profile("long", max_examples=2000)
# Triton decides when a kernel is defined. It then runs on the CPU, for calls that ask for it by name.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
