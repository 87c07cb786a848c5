"""One thread for every test: the shapes are tiny, and test workers share the machine's cores."""

import torch

torch.set_num_threads(1)
