"""One thread for every test: the shapes are tiny, and test workers share the machine's cores."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
# For fuzzing by hand, with fresh random cases: pytest tests/checkpoint/test_fuzz.py --hypothesis-profile=long
settings.register_profile("long", max_examples=2000)
