"""The methods by name: BiSLS, BiSPS and hand-tuned steps as settings of one :class:`Method`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from bilevel import require
from bilevel.hypergradients import Hypergradient, Implicit
from bilevel.linear import ConjugateGradient
from bilevel.method import Method
from bilevel.rules import Adam, Armijo, Fixed, Polyak, Reset, Steepest
from bilevel.trials import Response

Direction = Literal["adam", "sgd"]

# Solved to a tenth: a batch does not deserve more, and the response is consistent at any accuracy;
# closer where there is no noise and that is not enough to know the slope. Few systems ask for more
# than 20 products; where g is nearly flat in many directions, less than these end in nonsense.
# As many batches as their Hessian's noise asks for: what one misses can cost more than its products
DEFAULT = Implicit(ConjugateGradient(steps=150, rtol="auto"), average="auto")

# Share of the predicted decrease that inner searches ask for: their batches are not averaged, and
# what is best for one of them is too long for all data
INNER_C = 0.8

# The same for a y that is trained as networks are, see :func:`bilevel.inner.trains`: with it none
# of five deep ones is far from the best; with less momentum, another share or no memory some are
TRAINING_C = 0.7
TRAINING_ADAM = Adam(descends=True)

# Share of its last step that the outer search remembers at least: a fall by more is one batch's
RETAIN = 0.25

# Little momentum, more as steps shrink, and a bounded preconditioner: a searched step needs a
# direction of descent
SEARCHED_ADAM = Adam(beta1="auto", beta2=0.999, eps=1e-2, normalised=True, descends=True)


def bisls(
    direction: Direction = "adam",
    outer_step: float = 1.0,
    inner_step: float = 1.0,
    slack: float = 0.0,
    reset: Reset = "grow",
    hypergradient: Hypergradient | None = None,
    *,
    response: Response = "tangent",
    inner_solver: Callable[..., Any] | None = None,
) -> Method:
    """BiSLS: a stochastic Armijo search at both levels (BiSLS-SGD, BiSLS-Adam).

    Outer condition, with the direction d = -A^{-1} h of the hypergradient h:

        f(x + alpha d, y(alpha)) <= f(x, y) + c alpha phi'(0) + slack |f(x, y)|

    with c between 0.3 and 0.6, as the noise of f asks for, and 0.8 for the inner steps. f is the
    mean of 1 to 8 outer batches, as it asks for, too, or of as many draws, where f draws random
    numbers itself. A first step is judged once more where y has settled; where f has kinks a longer
    step than those found is tried now and then; while the linear system of h is left unsolved
    (a residual above 1 three times in a row, without noise in g) x stays; and kinks of g that its
    second derivatives miss, of |z| or hinges, are rounded off, which a warning tells.

    Args:
        direction: 'adam' or 'sgd' (A = I). The inner direction is -g_y in both; that of Adam where
            y is trained as networks are, on batches of a g that is not convex.
        outer_step, inner_step: first steps tried, > 0. The first search goes up or down from there
            as far as the loss falls, so that any value serves.
        slack: allowed relative increase, >= 0. Zero is enough because a trial is judged on the
            response y(alpha) that the hypergradient differentiates.
        reset: where searches start: 'grow' (1.2 times the last step, with 'sgd' on the tangent
            twice it; an outer step on the tangent counts as a quarter of the one before at
            least), 'last', 'fixed'.
        hypergradient: None: implicit, by conjugate gradients to a relative residual of 0.1, or
            less where g has no noise and the slope asks for it; g averaged over as many inner
            batches as its noise asks for.
        response: y(alpha): 'tangent', 'refine' or 'frozen', see :class:`bilevel.trials.Trials`.
        inner_solver: your own way to y instead of gradient steps: a torch.optim.Optimizer class; a
            function(parameters) that makes an optimizer, or a pair of one and a scheduler; or a
            function(x, y, batches) that returns the new y.

    Reference: Fan et al. 2023 (arXiv 2305.18666). The response 'tangent' is ours.
    """
    require.choice("bisls", "direction", direction, ("adam", "sgd"))
    for name, step in (("outer_step", outer_step), ("inner_step", inner_step)):
        require.number("bisls", name, step)
    require.number("bisls", "slack", slack, "[0, inf)")
    require.choice("bisls", "reset", reset, ("grow", "last", "fixed"))
    require.choice("bisls", "response", response, ("tangent", "refine", "frozen"))
    # small batches lead an Adam direction astray where steps double, but not h where y follows
    follows = response == "tangent"
    growth = 2.0 if direction == "sgd" and follows else 1.2
    return Method(
        f"bisls-{direction}",
        DEFAULT if hypergradient is None else hypergradient,
        SEARCHED_ADAM if direction == "adam" else Steepest(),
        Armijo(outer_step, "auto", slack, reset, growth, retain=RETAIN if follows else 0.0),
        Armijo(inner_step, INNER_C, reset=reset, growth=growth),
        response,
        inner_solver,
        corrects=inner_solver is None,
        training=(TRAINING_ADAM, Armijo(inner_step, TRAINING_C, reset=reset)),
    )


def bisps(
    max_outer_step: float | None = None,
    max_inner_step: float | None = None,
    min_outer_step: float | None = None,
    hypergradient: Hypergradient | None = None,
    *,
    outer_lower_bound: float = 0.0,
    inner_lower_bound: float = 0.0,
    c: float = 1.0,
    inner_solver: Callable[..., Any] | None = None,
) -> Method:
    """BiSPS: stochastic Polyak steps at both levels, under bounds that fall like 1/sqrt(k+1).

        beta  = min{ (g - lower bound) / (c ||g_y||^2), max_inner_step_k }
        alpha = min{ max{ min_outer_step_k, (f - lower bound) / (c ||h||^2) }, max_outer_step_k }

    Args:
        max_outer_step, max_inner_step: bounds at k = 0, > 0; None: measured by line
            searches in the iterations 0, 1, 3, 7, 15, ..., at the inner level one per step.
        min_outer_step: floor at k = 0; None: 1e-3 of ``max_outer_step``.
        hypergradient: as for :func:`bisls`.
        outer_lower_bound, inner_lower_bound: of the losses on any batch.
        c: scale of the Polyak step, at least 1/2 for convergence.
        inner_solver: as for :func:`bisls`.

    Reference: Fan et al. 2023 (arXiv 2305.18666), eqs. (10), (11).
    """
    for name, step in (
        ("max_outer_step", max_outer_step),
        ("max_inner_step", max_inner_step),
    ):
        if step is not None:
            require.number("bisps", name, step)
    require.number("bisps", "c", c)
    for name, bound in (
        ("outer_lower_bound", outer_lower_bound),
        ("inner_lower_bound", inner_lower_bound),
    ):
        require.number("bisps", name, bound, "(-inf, inf)")
    if min_outer_step is not None:
        require.number("bisps", "min_outer_step", min_outer_step, "[0, inf)")
    if min_outer_step is not None and max_outer_step is None:
        raise ValueError(
            f"bisps(min_outer_step={min_outer_step!r}) without max_outer_step: the two bounds "
            f"belong together; give both, or neither to have them measured."
        )
    if min_outer_step is None:
        lower = 1e-3 * (max_outer_step or 1.0)
    elif min_outer_step <= (max_outer_step or 0):
        lower = min_outer_step
    else:
        raise ValueError(
            f"bisps(min_outer_step={min_outer_step!r}, max_outer_step={max_outer_step!r}): the "
            f"floor must lie between 0 and the ceiling; give a smaller floor."
        )
    return Method(
        "bisps",
        DEFAULT if hypergradient is None else hypergradient,
        Steepest(),
        Polyak(outer_lower_bound, c, lower, max_outer_step),
        Polyak(inner_lower_bound, c, 0.0, max_inner_step),
        inner_solver=inner_solver,
        corrects=False,
        rounds=False,  # it lags where g is stiff, as rounded kinks are
        outer_batches=1,
    )


def fixed(
    direction: Direction = "adam",
    outer_step: float = 1e-2,
    inner_step: float = 1e-1,
    hypergradient: Hypergradient | None = None,
    *,
    decay: float = 0.0,
    inner_solver: Callable[..., Any] | None = None,
) -> Method:
    """Hand-tuned steps at both levels: the baseline.

    Args:
        direction: 'adam' (as published, momentum 0.9) or 'sgd' at the outer level; the inner one
            is -g_y.
        outer_step, inner_step: > 0.
        decay: steps fall like (k + 1)^-decay; 0 is constant, 0.5 the usual schedule.
        hypergradient, inner_solver: as for :func:`bisls`.
    """
    require.choice("fixed", "direction", direction, ("adam", "sgd"))
    for name, step in (("outer_step", outer_step), ("inner_step", inner_step)):
        require.number("fixed", name, step)
    require.number("fixed", "decay", decay, "[0, inf)")
    return Method(
        direction,
        DEFAULT if hypergradient is None else hypergradient,
        Adam() if direction == "adam" else Steepest(),
        Fixed(outer_step, decay),
        Fixed(inner_step, decay),
        inner_solver=inner_solver,
        averages=False,
        corrects=False,
        rounds=False,
        outer_batches=1,
    )


PRESETS: dict[str, Callable[[], Method]] = {
    "bisls-adam": partial(bisls, "adam"),
    "bisls-sgd": partial(bisls, "sgd"),
    "bisps": bisps,
    "adam": partial(fixed, "adam"),
    "sgd": partial(fixed, "sgd"),
}
