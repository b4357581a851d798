"""How many threads compute, whatever the environment asks for."""

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json
import numpy as np
import torch
from threadpoolctl import threadpool_info
from h2t.device import use_threads
before = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
use_threads(1)
np.linalg.eigh(np.eye(50))
pools = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
print(json.dumps([before, pools, torch.get_num_threads()]))
"""


def test_every_library_computes_with_the_threads_that_are_stated() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    before, pools, by_torch = json.loads(done.stdout)
    assert max(before) == 2
    assert len(pools) >= 2  # NumPy's and SciPy's
    assert set(pools) == {1}
    assert by_torch == 1
