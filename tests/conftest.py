"""One thread in the tests' process: sums in another order differ in the last digits, which goldens see."""

import torch

torch.set_num_threads(1)
