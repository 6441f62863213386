"""What real training throws at an optimizer: it works, or it is refused in words."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import optim
from tests.optim.tables import AVERAGES, METHODS, ONCE, POLYAK, LeastSquares, RandomSteps, flat

SEARCHES = [m for m in ONCE if m.search]
POLYAK_ONCE = [m for m in ONCE if not m.search]
BAD = [math.nan, math.inf, -math.inf]


def advance(method, steps=5, **options):
    """A method a few steps into a problem."""
    problem = LeastSquares(noise=0.3)
    params = problem.params()
    optimizer = method(params, **options)
    for t in range(steps):
        problem.step(optimizer, t, params)
    return problem, params, optimizer


def snapshot(optimizer):
    """Everything in the state dict, flattened and copied."""
    saved = optimizer.state_dict()
    state = {**saved["state"], "memory": saved["param_groups"][0].get("memory", {})}
    return {(k, n): t.clone() for k, kept in state.items() for n, t in kept.items()}


def assert_untouched(before, params, optimizer, x):
    np.testing.assert_array_equal(flat(params), x)
    after = snapshot(optimizer)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("method", POLYAK_ONCE, ids=str)
def test_non_finite_leaves_no_trace(method, bad, foreach):
    problem, params, optimizer = advance(method, foreach=foreach)
    x, before = flat(params), snapshot(optimizer)
    optimizer.step(loss=bad, target=0.0)
    assert_untouched(before, params, optimizer, x)
    assert optimizer.last.step == 0
    if method.make is not optim.ClippedSGD:
        optimizer.step(loss=1.0, target=bad)
        assert_untouched(before, params, optimizer, x)
    params[1].grad[0, 1] = bad
    optimizer.step(loss=1e3, target=0.0)
    assert_untouched(before, params, optimizer, x)
    assert "not finite" in optimizer.last.active
    problem.step(optimizer, 6, params)  # and it goes on
    assert np.isfinite(flat(params)).all()


@pytest.mark.parametrize("method", POLYAK_ONCE, ids=str)
def test_overflow_leaves_no_trace(method):
    _, params, optimizer = advance(method)
    x, before = flat(params), snapshot(optimizer)
    params[0].grad[0] = 1e200
    optimizer.step(loss=1e3, target=0.0)
    assert_untouched(before, params, optimizer, x)


@pytest.mark.parametrize("method", POLYAK_ONCE, ids=str)
def test_a_step_too_long_leaves_no_trace(method):
    """Every number is finite, but the step would end where floats are far apart."""
    if method.make in (optim.ClippedSGD, optim.IAMAdam):
        pytest.skip("never far: clipped, or capped in Adam's metric")
    _, params, optimizer = advance(method)
    x, before = flat(params), snapshot(optimizer)
    for p in params:
        p.grad = torch.full_like(p, 1e60)
    optimizer.step(loss=1e180, target=0.0)
    assert_untouched(before, params, optimizer, x)
    assert optimizer.last.step == 0 and optimizer.last.active == "overflow"
    assert math.isfinite(optimizer.last.numerator / optimizer.last.denominator)


def test_a_step_beyond_all_floats():
    x = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = optim.SPS([x], max_lr=0.1)
    x.grad = torch.full_like(x, 1e-160)
    optimizer.step(loss=1.0)
    assert x.item() == 1 and optimizer.last.active == "overflow"


@pytest.mark.parametrize("foreach", [True, False])
def test_the_best_point_where_the_step_is_refused(foreach):
    x = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = optim.InexactPolyak([x], steps=4, foreach=foreach)
    for loss, gradient, best, active in (
        (5.0, 1.0, 1.0, ""),
        (1.0, 1e-20, -1.5, "overflow"),
        (0.5, math.nan, -1.5, "not finite"),
        (3.0, 1.0, -1.5, ""),
    ):
        x.grad = torch.full_like(x, gradient)
        optimizer.step(loss=loss)
        assert optimizer.best()[0].item() == best and optimizer.last.active == active
    assert optimizer.param_groups[0]["memory"] == {"lowest": 1.0} and x.item() == -3.0


@pytest.mark.parametrize(
    "max_norm, active", [(1.0, ""), (3.0, ""), (5.0, "cap"), (math.inf, "cap")]
)
def test_active_of_clipping(max_norm, active):
    """Its rule is max_norm / ||g||, its cap 1: where that is active, nothing was clipped."""
    x = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = optim.ClippedSGD([x], lr=0.5, max_norm=max_norm)
    x.grad = torch.tensor([4.0])
    optimizer.step()
    assert optimizer.last.active == active
    assert optimizer.last.step == pytest.approx(0.5 * min(1, max_norm / 4))
    optimizer.step(loss=math.nan)
    assert optimizer.last.step == 0 and optimizer.last.active == "not finite"


@pytest.mark.parametrize("make", [optim.ScheduleFreeSPS, optim.ScheduleFreeAdamSPS])
@pytest.mark.parametrize("cap", [math.inf, 1e-3])
def test_active_of_warm_up(make, cap):
    x = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = make([x], warmup_steps=2, max_lr=cap)
    for k in range(3):
        x.grad = torch.full_like(x, 4.0)
        optimizer.step(loss=100.0)
        step, n, d, active = optimizer.last
        assert step == pytest.approx(min(1, (k + 1) / 2) * min(n / d, cap))
        assert active.split("+") == ["cap"] * (cap < 1) + ["warm-up"] * (k < 1) or active == ""
        assert bool(active) == (cap < 1 or k < 1)


@pytest.mark.parametrize("loss", [math.inf, 1e3])
def test_a_refused_step_is_not_capped(loss):
    x = torch.nn.Parameter(torch.ones(2))
    optimizer = optim.SPS([x], max_lr=0.1)
    x.grad = torch.ones(2)
    optimizer.step(loss=loss)
    assert optimizer.last.active == ("cap" if loss == 1e3 else "not finite")


@pytest.mark.parametrize("method", POLYAK_ONCE, ids=str)
def test_zero_gradient(method):
    problem = LeastSquares()
    params = problem.params()
    optimizer = method(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step(loss=3.0, target=0.0)
    np.testing.assert_array_equal(flat(params), problem.start)
    if method.make is not optim.ClippedSGD:
        assert optimizer.last.step == 0 and "zero gradient" in optimizer.last.active


@pytest.mark.parametrize("make", [optim.SPS, optim.ScheduleFreeAdamSPS, optim.IAM])
@pytest.mark.parametrize("bound", [0.0, 0, -3.0, torch.tensor(0.0), torch.tensor([-3.0])])
def test_zero_and_negative_targets_are_targets(make, bound):
    x = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
    x.grad = torch.tensor([1.0, 3.0])
    optimizer = make([x], lower_bound=-100.0)
    optimizer.step(loss=torch.tensor(5.0, requires_grad=True), target=bound)
    assert optimizer.last.numerator == pytest.approx(5.0 - float(bound))


@pytest.mark.parametrize("method", ONCE, ids=str)
def test_missing_and_frozen(method):
    """A parameter without a gradient stays, whatever else happens, and can join later."""
    torch.manual_seed(0)
    a, b, c = (torch.nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(3))
    c.requires_grad_(False)
    optimizer = method([a, b, c])

    def loss(*used):
        return sum((p**2).sum() for p in used) + 1

    def step(*used):
        if method.search:
            return optimizer.step(lambda: loss(*used))
        optimizer.zero_grad()
        value = loss(*used)
        value.backward()
        optimizer.step(loss=value, target=-100.0)

    start = b.detach().clone(), c.detach().clone()
    for _ in range(3):
        step(a)
    assert torch.equal(b, start[0]) and torch.equal(c, start[1])
    step(a, b)
    assert not torch.equal(b, start[0])
    if "adam" in method.name:
        assert optimizer.state[a]["step"] == 4 and optimizer.state[b]["step"] == 1
    still = a.detach().clone()
    step(b)
    assert torch.equal(a, still)
    c.requires_grad_(True)  # unfrozen, unlike the others in one go
    step(a, b, c)
    assert not torch.equal(c, start[1])


def test_late_parameter_has_its_own_bias_correction():
    """A parameter that joins after many steps gets the first Adam step, not one 31 times it."""
    a, b = (torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    optimizer = optim.ScheduleFreeAdamSPS([a, b], betas=(1.0, 0.999), max_lr=0.01)
    for _ in range(100):
        a.grad = torch.ones_like(a)
        optimizer.step(loss=100.0)
    b.grad = 5 * torch.ones_like(b)
    optimizer.step(loss=1000.0)
    np.testing.assert_allclose(optimizer.state[b]["z"], 0.99, rtol=1e-6)


@pytest.mark.parametrize("method", ONCE, ids=str)
def test_nothing_to_do(method):
    x = torch.nn.Parameter(torch.ones(2))
    optimizer = method([x])
    if method.search:
        with pytest.raises(TypeError, match="does not depend"):
            optimizer.step(lambda: torch.tensor(1.0))
    else:
        assert optimizer.step(loss=1.0, target=0.0) == 1.0
    assert torch.equal(x, torch.ones(2)) and optimizer.last is None


@pytest.mark.parametrize("method", POLYAK, ids=str)
def test_one_step_size_for_all_groups(method):
    """Groups do not change the step; 'lr' of a group does, for that group alone."""
    problem = RandomSteps(12)
    a, b = problem.params(), problem.params()
    one, many = method(a), method([{"params": [p]} for p in b])
    for t in range(12):
        problem.step(one, t, a)
        problem.step(many, t, b)
    np.testing.assert_allclose(flat(a), flat(b), rtol=1e-12)
    c = problem.params()
    half = method([{"params": c[:1]}, {"params": c[1:], "lr": 0.0}])
    problem.step(half, 0, c)
    assert not torch.equal(c[0], problem.params()[0])
    assert torch.equal(c[1], problem.params()[1])


def test_group_cannot_change_the_rule():
    x, y = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    with pytest.raises(ValueError, match="max_lr=0.1.*one number for all groups.*'lr'"):
        optim.SPS([{"params": [x]}, {"params": [y], "max_lr": 0.1}])


def test_scheduler():
    x = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = optim.SPS([x])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (k + 1))
    steps = []
    for _ in range(3):
        x.grad = torch.tensor([2.0])
        optimizer.step(loss=1.0)
        scheduler.step()
        steps.append(optimizer.last.step)
    assert steps == pytest.approx([0.25, 0.125, 0.25 / 3])


@pytest.mark.parametrize("method", ONCE, ids=str)
def test_one_cycle(method):
    """A scheduler with a max_lr of its own leaves ours alone, also after loading."""
    problem, other = LeastSquares(noise=0.3), LeastSquares(noise=0.3)
    a, b = problem.params(), other.params()
    plain, cycled = method(a), method(b)
    base = plain.param_groups[0]["lr"]
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        cycled, max_lr=0.01, total_steps=20, cycle_momentum=False
    )
    for t in range(6):
        if t == 3:
            state, cycled = cycled.state_dict(), method(b)
            cycled.load_state_dict(state)
            scheduler.optimizer = cycled
        for group in cycled.param_groups:
            group["lr"] = base  # so that only other traces of the scheduler show
        problem.step(plain, t, a)
        other.step(cycled, t, b)
        scheduler.step()
        assert cycled.param_groups[0]["max_lr"] == 0.01
        assert cycled.param_groups[0]["lr"] != base
    np.testing.assert_array_equal(flat(a), flat(b))


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_momentum_that_a_scheduler_moves(fast, stored):
    """The average stays that of the z, and y is of the beta of its step, even where it is refused
    (NaN), and wherever beta has changed in eval mode."""
    problem = LeastSquares(noise=0.3)
    params = problem.params()
    optimizer = optim.ScheduleFreeAdamSPS(params, max_lr=0.3, foreach=fast, lower_bound=-9.0)
    betas = [0.2 if stored else 0.9, 0.5, 0.8, 0.8, 0.4, 1.0, 1.0, 0.9, 0.3]
    x = flat(params)
    for t, beta in enumerate(betas):
        (group,) = optimizer.param_groups
        group["betas"] = (beta, 0.999)
        loss = problem.loss(t, params)
        optimizer.zero_grad()
        loss.backward()
        if t in (3, 4):
            params[0].grad.view(-1)[0] = math.nan
        optimizer.step(loss=loss)
        z, memory = flat([optimizer.state[p]["z"] for p in params]), group["memory"]
        if t not in (3, 4):
            x = x + float(memory["lr_max"] ** 2 / memory["weight_sum"]) * (z - x)
        np.testing.assert_allclose(flat(params), (1 - beta) * z + beta * x, atol=1e-12)
        assert ("x" in optimizer.state[params[0]]) == stored
    optimizer.eval()
    np.testing.assert_allclose(flat(params), x, atol=1e-12)
    group["betas"] = (0.7, 0.999)
    optimizer.train()
    np.testing.assert_allclose(flat(params), 0.3 * z + 0.7 * x, atol=1e-12)
    optimizer.eval()
    np.testing.assert_allclose(flat(params), x, atol=1e-12)


def test_momentum_that_falls_too_low():
    problem = LeastSquares(noise=0.3)
    params = problem.params()
    optimizer = optim.ScheduleFreeAdamSPS(params, max_lr=0.3, lower_bound=-9.0)
    problem.step(optimizer, 0, params)
    before = flat(params)
    optimizer.param_groups[0]["betas"] = (0.2, 0.999)
    with pytest.raises(ValueError, match="beta fell from 0.9 to 0.2.*cycle_momentum=False"):
        problem.step(optimizer, 1, params)
    np.testing.assert_array_equal(flat(params), before)


@pytest.mark.parametrize("key", ["weight_decay", "momentum"])
def test_unknown_option_of_a_group(key):
    x, y, z = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    with pytest.raises(ValueError, match=f"SPS got a group with {key}=0.1.*no such option"):
        optim.SPS([{"params": [x]}, {"params": [y], key: 0.1}])
    optimizer = optim.SPS([{"params": x, key: 0.0, "initial_lr": 1.0, "name": "the first"}])
    with pytest.raises(ValueError, match=f"{key}=0.1"):
        optimizer.add_param_group({"params": [y], key: 0.1})
    assert len(optimizer.param_groups) == 1
    optim.IAM([{"params": [z], "weight_decay": 0.1}])


@pytest.mark.parametrize("method", ONCE, ids=str)
def test_complex_is_refused(method):
    with pytest.raises(ValueError, match=r"complex parameter of shape \(2,\).*view_as_real"):
        method([torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))])


@pytest.mark.parametrize("method", ONCE, ids=str)
def test_sparse_is_refused(method):
    layer = torch.nn.Embedding(5, 2, sparse=True)
    before = layer.weight.detach().clone()
    optimizer = method(layer.parameters())

    def loss():
        return (layer(torch.tensor([1])) ** 2).sum()

    with pytest.raises(RuntimeError, match=r"sparse gradient .*\(5, 2\).*SparseAdam"):
        if method.search:
            optimizer.step(loss)
        else:
            value = loss()
            value.backward()
            optimizer.step(loss=value, target=0.0)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("method", POLYAK_ONCE, ids=str)
def test_bfloat16_keeps_float32_state(method, foreach):
    """Parameters in bfloat16 follow the float32 run to bfloat16's precision, over many steps."""
    finals = []
    for dtype in (torch.float32, torch.bfloat16):
        problem = LeastSquares(noise=0.1)
        params = problem.params(dtype)
        optimizer = method(params, foreach=foreach)
        for t in range(30):
            problem.step(optimizer, t, params)
        for kept in optimizer.state_dict()["state"].values():
            assert all(v.dtype in (torch.float32, torch.float64) for v in kept.values())
        if method.average:
            optimizer.eval()
        finals.append(problem.loss(0, params).item())
    if method.average:
        assert finals[1] == pytest.approx(finals[0], abs=0.1)
    assert math.isfinite(finals[1])


def test_small_steps_are_not_lost_in_bfloat16():
    """Updates below half an ulp of the parameter add up in the float32 average."""
    x = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = optim.IAM([x], averaging=9.0, max_lr=2e-4)
    for _ in range(500):
        x.grad = torch.ones_like(x)
        optimizer.step(loss=100.0)
    assert x.item() == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("method", POLYAK_ONCE, ids=str)
def test_grad_scaler(method):
    """scaler.step(optimizer, loss=...) unscales, and skips what overflowed."""
    problem = LeastSquares()
    a, b = problem.params(torch.float32), problem.params(torch.float32)
    plain, scaled = method(a), method(b)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for t in range(5):
        problem.step(plain, t, a)
        scaled.zero_grad()
        loss = problem.loss(t, b)
        scaler.scale(loss).backward()
        scaler.step(scaled, loss=loss, target=problem.target(t))
        scaler.update()
    np.testing.assert_allclose(flat(a), flat(b), rtol=1e-5)
    before = flat(b)
    b[0].grad[0] = math.inf
    scaler.step(scaled, loss=loss, target=0.0)
    np.testing.assert_array_equal(flat(b), before)


@pytest.mark.parametrize("method", POLYAK_ONCE, ids=str)
def test_accumulation(method):
    """Gradients of half batches, summed, with the mean loss: the step of the whole batch."""
    problem = LeastSquares()
    a, b = problem.params(), problem.params()
    whole, halves = method(a), method(b)
    for t in range(5):
        problem.step(whole, t, a)
        halves.zero_grad()
        parts = [0.25 * problem.loss(t, b), 0.75 * problem.loss(t, b)]
        for part in parts:
            part.backward()
        halves.step(loss=sum(parts), target=problem.target(t))
    np.testing.assert_allclose(flat(a), flat(b), rtol=1e-9)


@pytest.mark.parametrize("method", POLYAK_ONCE, ids=str)
def test_closure_is_loss(method):
    problem = LeastSquares()
    a, b = problem.params(), problem.params()
    left, right = method(a), method(b)

    for t in range(5):

        def closure(t=t):
            assert torch.is_grad_enabled()
            right.zero_grad()
            loss = problem.loss(t, b)
            loss.backward()
            return loss

        assert problem.step(left, t, a) == right.step(closure, target=problem.target(t))
    np.testing.assert_array_equal(flat(a), flat(b))


class NoSync(TorchDispatchMode):
    """Fails where the host would wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "is_nonzero", "nonzero"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("method", POLYAK, ids=str)
def test_no_host_sync(method, foreach):
    problem, params, optimizer = advance(method, steps=0, foreach=foreach)
    for t in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        if t == 2:
            params[0].grad = None  # also when the layout changes
        with NoSync():
            optimizer.step(loss=torch.tensor(3.0), target=torch.tensor(1.0))
            if method.average:
                optimizer.eval()
                optimizer.train()
    assert optimizer.last.step >= 0


def test_no_sync_mode_sees_syncs():
    with NoSync(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        torch.tensor(1.0).item()


@pytest.mark.parametrize("method", POLYAK_ONCE, ids=str)
def test_gradients_are_left_alone(method):
    problem, params, optimizer = advance(method)
    before = [p.grad.clone() for p in params]
    optimizer.step(loss=1.0, target=0.0)
    for p, g in zip(params, before, strict=True):
        assert torch.equal(p.grad, g)


# -- misuse ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", AVERAGES, ids=str)
def test_step_in_eval_mode(method):
    _, _, optimizer = advance(method)
    optimizer.eval()
    with pytest.raises(RuntimeError, match=r"eval mode.*optimizer\.train\(\)"):
        optimizer.step(loss=1.0, target=0.0)
    optimizer.train()
    optimizer.step(loss=1.0, target=0.0)


@pytest.mark.parametrize("method", ONCE, ids=str)
def test_misuse_of_step(method):
    problem, params, optimizer = advance(method, steps=1)
    call = r"step\(closure\)" if method.search else r"step\(loss=loss\), or step\(closure\)"
    for value in (torch.tensor(2.5), 2.5):
        with pytest.raises(TypeError, match=rf"step\(\) got .*2\.5.*Write {call} with a function"):
            optimizer.step(value)
    if method.search:
        with pytest.raises(ValueError, match="without a closure"):
            optimizer.step()
        with pytest.raises(ValueError, match="with loss="):
            optimizer.step(lambda: 1.0, loss=1.0)
        with pytest.raises(ValueError, match=r"called backward\(\)"):

            def closure():
                loss = problem.loss(0, params)
                loss.backward()
                return loss

            optimizer.step(closure)
        with pytest.raises(TypeError, match="does not depend"):
            optimizer.step(lambda: 1.0)
        return
    with pytest.raises(ValueError, match="Give one of the two"):
        optimizer.step(lambda: 1.0, loss=1.0)
    with pytest.raises(ValueError, match=r"loss has shape \(3,\)"):
        optimizer.step(loss=torch.ones(3), target=0.0)
    if method.make is not optim.ClippedSGD:
        with pytest.raises(ValueError, match="got no loss"):
            optimizer.step()
        with pytest.raises(ValueError, match=r"target has shape \(2,\)"):
            optimizer.step(loss=1.0, target=torch.ones(2))
    x = flat(params)
    problem.step(optimizer, 0, params)  # a refused call has left nothing half done
    assert not np.array_equal(flat(params), x)


def test_oracle_needs_its_target():
    x = torch.nn.Parameter(torch.ones(1))
    x.grad = torch.ones(1)
    with pytest.raises(ValueError, match="SPSPlus.*no target.*SafeguardedSPS"):
        optim.SPSPlus([x]).step(loss=1.0)


@pytest.mark.parametrize(
    "make, options",
    [
        (optim.SPS, {"c": 0.0}),
        (optim.SPS, {"max_lr": -1.0}),
        (optim.SPS, {"c": math.nan}),
        (optim.SPSPlus, {"max_lr": 0.0}),
        (optim.SLS, {"max_lr": math.inf}),  # from which there is no way back by halves
        (optim.SLSB, {"max_lr": math.inf}),
        (optim.AdaSLS, {"max_lr": math.inf}),
        (optim.SafeguardedSPS, {"safeguard": -1.0}),
        (optim.SafeguardedSPS, {"safeguard": "mean"}),
        (optim.SafeguardedSPS, {"safeguard": "ema", "rho": 1.0}),
        (optim.SPSB, {"decay": -0.5}),
        (optim.DecSPS, {"c0": 0.0}),
        (optim.AdaSPS, {"c": 0.0}),
        (optim.InexactPolyak, {"steps": 0}),
        (optim.ClippedSGD, {"lr": 0.0, "max_norm": 1.0}),
        (optim.ClippedSGD, {"lr": 1.0, "max_norm": 0.0}),
        (optim.IAM, {"averaging": -1.0}),
        (optim.IAM, {"averaging": "square"}),
        (optim.IAM, {"weight_decay": -1.0}),
        (optim.IAMAdam, {"beta2": 1.0}),
        (optim.IAMAdam, {"eps": 0.0}),
        (optim.ScheduleFreeSPS, {"beta": 1.1}),
        (optim.ScheduleFreeSPS, {"beta": -0.1}),
        (optim.ScheduleFreeSPS, {"warmup_steps": -1}),
        (optim.ScheduleFreeSPS, {"weight_lr_power": -2.0}),
        (optim.ScheduleFreeAdamSPS, {"betas": (0.9, 1.0)}),
        (optim.SLS, {"c": 1.0}),
        (optim.SLS, {"shrink": 0.0}),
        (optim.SLS, {"reset": "double"}),
        (optim.SLSB, {"decay": -1.0}),
        (optim.AdaSLS, {"scale": 0.0}),
    ],
)
def test_options_out_of_range(make, options):
    x = torch.nn.Parameter(torch.ones(1))
    wrong = next((v for v in options.values() if v not in (1.0, "ema")), 1.0)
    with pytest.raises(ValueError) as error:
        make([x], **options)
    message = str(error.value)
    assert "Give" in message and (repr(wrong) in message or "betas[1]=1.0" in message)


# -- line searches -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", SEARCHES, ids=str)
def test_search_replays_the_generator(method):
    """Under dropout all trials see one mask, and the generator ends where one loss leaves it."""
    x = torch.nn.Parameter(torch.ones(50))
    optimizer = method([x])
    masks = []

    def closure():
        masks.append(torch.rand(50) > 0.5)
        return ((x * masks[-1]) ** 2).sum() * 50

    torch.manual_seed(0)
    optimizer.step(closure)
    assert len(masks) > 2 and all(torch.equal(m, masks[0]) for m in masks)
    after = torch.rand(1)
    torch.manual_seed(0)
    torch.rand(50)
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize("method", SEARCHES, ids=str)
@pytest.mark.parametrize("bad", BAD)
def test_search_refuses_what_is_not_finite(method, bad):
    x = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = method([x])
    optimizer.step(lambda: (x**2).sum() + bad)
    assert x.item() == 1.0 and optimizer.last.step == 0
    calls = []

    def closure():
        calls.append(1)
        return (x**2).sum() + (0 if len(calls) == 1 else abs(bad))

    optimizer.step(closure)
    assert x.item() == 1.0 and optimizer.last.active == "no step accepted"
    optimizer.step(lambda: (x**2).sum())
    assert x.item() != 1.0


@pytest.mark.parametrize("method", SEARCHES, ids=str)
def test_search_where_the_loss_differentiates(method):
    """A penalty on the derivative of the model finds the steps of its closed form."""
    a, b = (torch.nn.Parameter(torch.tensor([3.0], dtype=torch.float64)) for _ in range(2))
    left, right = method([a]), method([b])
    points = torch.linspace(0, 1, 5, dtype=torch.float64)

    def penalty():
        x = points.clone().requires_grad_()
        u = torch.sin(2 * torch.rand(())) * a * x
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return ((u + slope) ** 2).mean()

    def closed():
        slope = torch.sin(2 * torch.rand(())) * b
        return ((slope * points + slope) ** 2).mean()

    for seed in range(4):
        for optimizer, closure in ((left, penalty), (right, closed)):
            torch.manual_seed(seed)
            optimizer.step(closure)
        assert a.item() == pytest.approx(b.item(), rel=1e-12)
        assert left.last == pytest.approx(right.last) and left.last.step > 0
    assert abs(a.item()) < 1


@pytest.mark.parametrize("method", SEARCHES, ids=str)
def test_search_raises_what_the_closure_raises(method):
    x = torch.nn.Parameter(torch.tensor([1.0]))
    calls = []

    def closure():
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("out of memory")
        return (x**2).sum()

    with pytest.raises(RuntimeError, match="out of memory"):
        method([x]).step(closure)
    assert x.item() == 1.0 and len(calls) == 2


def test_active_of_searches():
    """ "cap" tells that the first trial was accepted, whatever AdaSLS then makes of it."""
    x = torch.nn.Parameter(torch.tensor([2.0, 1.0]))
    optimizer = optim.AdaSLS([x], max_lr=0.1)
    for _ in range(3):
        optimizer.step(lambda: (torch.tensor([1.0, 0.3]) * x**2).sum())
        assert optimizer.last.active == "cap"
    assert optimizer.last.step < 0.1
    for max_lr, active in ((0.5, "cap"), (4.0, "")):
        y = torch.nn.Parameter(torch.tensor([2.0]))
        optimizer = optim.SLS([y], max_lr=max_lr)
        optimizer.step(lambda y=y: (y**2).sum())
        assert optimizer.last.step == 0.5 and optimizer.last.active == active


@pytest.mark.parametrize("method", SEARCHES, ids=str)
def test_search_restores_after_an_exception(method):
    x = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = method([x])
    calls = []

    def closure():
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return (x**2).sum()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert x.item() == 1.0


@pytest.mark.parametrize("method", [m for m in METHODS if m.search], ids=str)
def test_armijo_holds(method):
    problem = LeastSquares(noise=0.5)
    params = problem.params()
    optimizer = method(params)
    for t in range(30):
        f, g, _ = problem.batch(t, flat(params))
        problem.step(optimizer, t, params)
        new = problem.batch(t, flat(params))[0]
        assert new <= f - 0.1 * optimizer.last.step * (g @ g) * (1 - 1e-9) + 1e-14
        assert optimizer.last.step > 0
