"""Ready bilevel problems and the command line.

``bilevel NAME`` (or ``python -m tasks NAME``) runs one of :data:`TASKS`. A task is one module of
this package, named like the task with underscores for dashes; :mod:`tasks.__main__` says what it
must define. What every task shares: :mod:`tasks.data` (data sets, minibatches, episodes) and
:mod:`tasks.run` (the run folder, figures, progress).
"""

from __future__ import annotations

#: Every task by name, with the line that ``--list`` shows; offered once its module exists.
TASKS = {
    "data-distillation": "learn a few images on which a model trains as well as on all of them",
    "hyper-representation": "learn features whose linear head does well on new data",
    "data-cleaning": "find the wrong labels of a training set by weighting its samples",
    "regularization": "choose one penalty per feature of a logistic regression",
    "poisson": "Poisson regression with the optimal value of every batch known",
    "synthetic": "a one-dimensional (L0, L1)-smooth function with known solution",
    "model-distillation": "teach a small language model from a black-box teacher",
    "language-model": "pre-train GPT-2 style, LSTM and T5 models with single-level optimizers",
    "quadratic": "random quadratic problems whose exact hypergradient is known",
    "ridge": "ridge regression whose exact hypergradient is known",
}
