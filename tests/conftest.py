"""One thread: small tensors gain nothing from more, and sums keep their order."""

import torch

torch.set_num_threads(1)
