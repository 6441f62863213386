"""SIGKILL at random moments: whatever was killed resumes, and ends bit for bit as if it had not.

BILEVEL_KILLS=N kills N times instead of a few. One process forks all runs, so that torch is
imported once: ``python -m tests.engine.test_kills N FOLDER``.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import bilevel
from tests.engine.test_checkpoints import inner, numbers, outer

KILLS = int(os.environ.get("BILEVEL_KILLS", 6))
STEPS = 40


class Noisy(Dataset):
    """Rows that are perturbed anew whenever they are read, by Python's and NumPy's generators."""

    def __init__(self, count):
        generator = torch.Generator().manual_seed(count)
        self.rows = torch.randn(count, 3, generator=generator, dtype=torch.float64)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        return row + 0.1 * (random.random() + np.random.rand()), int(row.sum() > 0)


METHODS = {
    "bisls-adam": lambda: "bisls-adam",
    "bisps": lambda: "bisps",
    "sgd unrolled": lambda: bilevel.fixed("sgd", 0.1, 0.1, bilevel.Unrolled()),
    "momentum": lambda: bilevel.bisls(
        "sgd", inner_solver=partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    ),
}


def solve(name, path, out):
    """One run, or what is left of it; its outcome goes to the file ``out``."""
    random.seed(3)
    np.random.seed(4)
    own = torch.Generator().manual_seed(1)  # one level has its own, the other torch's global one
    result = bilevel.solve(
        outer,
        inner,
        torch.full((3, 1), -3.0, dtype=torch.float64),
        torch.zeros(3, 2, dtype=torch.float64),
        outer_data=DataLoader(Noisy(22), 4, shuffle=True, generator=own),
        inner_data=DataLoader(Noisy(27), 5, shuffle=True),
        method=METHODS[name](),
        steps=STEPS,
        inner_steps=3,
        seed=5,
        checkpoint=path,
        checkpoint_every=1,
        resume=True,
    )
    end = [result.x, result.y, *result.state.vectors, torch.get_rng_state()]
    torch.save((end, repr(numbers(result)), result.reason, random.random()), out)


def start(*args):
    """``solve`` in a fork."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            solve(*args)
            code = 0
        finally:
            os._exit(code)
    return pid


def ended(pid):
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def same(a, b):
    (ends, *rest), (others, *others_rest) = torch.load(a), torch.load(b)
    return rest == others_rest and all(map(torch.equal, ends, others))


def main(kills, folder):
    import sympy  # noqa: F401  torch would import it in every fork

    assert not any(folder.iterdir()), "an old checkpoint would be resumed"
    torch.set_num_threads(1)
    moments = random.Random(kills)
    done, chains, equal, at, writing = 0, 0, 0, [], 0
    durations = {}
    for name in METHODS:
        begin = time.perf_counter()
        ended(start(name, folder / f"{name}.whole", folder / f"{name}.out"))
        durations[name] = time.perf_counter() - begin
    while done < kills:
        name = list(METHODS)[chains % len(METHODS)]
        path, out = folder / f"run{chains}", folder / f"run{chains}.out"
        chains += 1
        for _ in range(moments.randrange(1, 6)):
            pid = start(name, path, out)
            time.sleep(moments.uniform(0, durations[name]))
            os.kill(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if code == 0:  # it was faster
                break
            assert code == -signal.SIGKILL
            done += 1
            writing += len(list(folder.glob(f"{path.name}.????????.tmp")))
            saved = torch.load(path, weights_only=True)["k"] if path.exists() else 0
            at.append(saved)
        ended(start(name, path, out))
        equal += same(folder / f"{name}.out", out)
        assert not list(folder.glob("*.tmp"))
    print(json.dumps({"kills": done, "runs": chains, "equal": equal, "writing": writing, "at": at}))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_at_random_moments(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.test_kills", str(KILLS), str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60 + 5 * KILLS,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] >= KILLS
    assert found["equal"] == found["runs"]
    assert len(set(found["at"])) > 1  # not all of them before the first checkpoint


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
