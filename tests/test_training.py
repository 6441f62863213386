"""The benchmark of deep networks as y runs, in the small."""

import json
import math

import pytest

import bilevel
from benchmarks import training
from tasks.errors import MissingData


def test_training(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "RATES", (1e-2,))
    monkeypatch.setattr(training, "STEPS", (1e-1,))
    training.main(["--problems", "supernet", "--steps", "2", "--seeds", "1"])
    rows = json.loads(next(tmp_path.rglob("training.json")).read_text())["rows"]
    found = {row["method"]: row for row in rows}
    # the second iteration is the first in which g is known not to be convex
    assert found["bisls-adam"]["f"] != found["gradient steps"]["f"]
    assert 0 < found["adam 0.1, y 0.01"]["f"] < 2.5


@pytest.mark.parametrize("problem", training.PROBLEMS)
def test_networks_that_are_trained(problem):
    """The loss of guessing at first; second derivatives everywhere."""
    try:
        case = training.PROBLEMS[problem](0)
    except MissingData as error:
        pytest.skip(str(error))
    classes = {"domains of text": 65}.get(problem, 10)
    assert case.value(case.x, case.y) == pytest.approx(math.log(classes), rel=0.1)
    method = bilevel.fixed("adam", hypergradient=bilevel.Implicit(bilevel.ConjugateGradient(2)))
    result = case.solve(method, steps=1)
    assert result.history[0].failure is None and result.history[0].hypergrad_norm > 0
