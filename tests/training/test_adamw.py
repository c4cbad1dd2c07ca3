"""AdamW: torch.optim.AdamW's results and state, clipped in the same pass, on every instruction set."""

import copy
import math

import pytest
import torch

from fastlm.backends import cpu as _native
from fastlm.ops._shadow import attach_copy, copy_of
from fastlm.training import AdamW

SHAPES = [(7,), (1,), (33, 5), (40_000,), (0,), (70_001,)]
OPTIONS = [
    {},
    {"lr": 0.1, "betas": (0.5, 0.7), "eps": 1e-3, "weight_decay": 0.3},
    {"maximize": True, "weight_decay": 0.0},
]


def make(dtype=torch.float32, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def doubles(parameters):
    return [torch.nn.Parameter(p.detach().double()) for p in parameters]


def give_gradients(parameters, seed, grad_dtype=None):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        if grad_dtype is not None:
            p.grad_dtype = grad_dtype
        p.grad = torch.randn(p.shape, generator=generator).to(grad_dtype or p.dtype)


def gradients_like(parameters, others):
    for p, q in zip(parameters, others, strict=True):
        p.grad = q.grad.double().clone()


def groups(parameters):
    return [{"params": parameters[::2]}, {"params": parameters[1::2], "weight_decay": 0.0, "lr": 0.01}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matches_torch_in_double_precision(isa, options, grad_dtype):
    ours = make()
    truth = doubles(ours)
    optimizer, expected = AdamW(groups(ours), **options), torch.optim.AdamW(groups(truth), **options)
    for step in range(4):
        give_gradients(ours, step, grad_dtype)
        gradients_like(truth, ours)
        norm = torch.nn.utils.clip_grad_norm_(truth, 0.5).item()
        assert optimizer.gradient_norm() == pytest.approx(norm, rel=1e-6)
        before = [p.grad.clone() for p in ours]
        optimizer.step(max_norm=0.5)
        expected.step()
        assert all(torch.equal(p.grad, grad) for p, grad in zip(ours, before, strict=True))
    for p, q in zip(ours, truth, strict=True):
        # Four steps of a few roundings each, and an update that divides by a root.
        torch.testing.assert_close(p.double(), q, rtol=2e-6, atol=2e-6)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(optimizer.state[p][name].double(), expected.state[q][name], rtol=5e-6, atol=1e-8)


def test_bfloat16_parameters_are_as_close_as_torchs(isa):
    ours, theirs = make(torch.bfloat16), make(torch.bfloat16)
    truth = doubles(ours)
    optimizers = [AdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1, fused=True), torch.optim.AdamW(truth, lr=0.1)]
    give_gradients(ours, 0)
    give_gradients(theirs, 0)
    gradients_like(truth, ours)
    for optimizer in optimizers:
        optimizer.step()
    for p, q, t in zip(ours, theirs, truth, strict=True):
        assert p.dtype == optimizers[0].state[p]["exp_avg"].dtype == torch.bfloat16
        if t.numel():
            assert (p - t).abs().max() <= 1.01 * (q - t).abs().max() + 1e-3


def test_state_dicts_interchange_with_torch():
    ours = make()
    theirs = copy.deepcopy(ours)
    optimizer, other = AdamW(groups(ours)), torch.optim.AdamW(groups(theirs), fused=True)
    give_gradients(ours, 0)
    optimizer.step()
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            q.copy_(p)
    state = optimizer.state_dict()
    other.load_state_dict(copy.deepcopy(state))
    assert other.state_dict()["param_groups"][0].keys() == state["param_groups"][0].keys()
    give_gradients(ours, 1)
    give_gradients(theirs, 1)
    optimizer.step()
    other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    fresh = AdamW(groups(theirs))
    fresh.load_state_dict(other.state_dict())
    give_gradients(theirs, 2)
    fresh.step()
    assert all(int(fresh.state[q]["step"]) == 3 for q in theirs)


def test_norm_and_update_have_the_same_bits_for_any_number_of_threads(isa, threads):
    found = []
    for count in (1, 2, 3):
        threads(count)
        parameters = make()
        optimizer = AdamW(parameters)
        give_gradients(parameters, 0)
        norm = optimizer.gradient_norm()
        optimizer.step(max_norm=1.0, norm=norm)
        found.append((norm, parameters))
    for norm, parameters in found[1:]:
        assert norm == found[0][0]
        assert all(torch.equal(p, q) for p, q in zip(parameters, found[0][1], strict=True))


@pytest.mark.parametrize("shape", [(31,), (64,), (40_000,), (100, 33)], ids=str)
def test_copies_follow_the_parameters(isa, shape):
    (parameter,) = make(shapes=[shape])
    attach_copy(parameter)
    optimizer = AdamW([parameter], lr=0.1)
    for step in range(2):
        give_gradients([parameter], step)
        optimizer.step()
        assert torch.equal(copy_of(parameter), parameter.detach().bfloat16())
        assert parameter.fastlm_copy.version == parameter._version


def test_a_graph_over_old_values_is_refused():
    (parameter,) = make(shapes=[(5,)])
    loss = parameter.square().sum()
    parameter.grad = torch.ones(5)
    AdamW([parameter]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_norm_of_gradients_that_are_not_finite(isa, bad):
    parameters = make()
    give_gradients(parameters, 0)
    parameters[3].grad[123] = bad
    norm = AdamW(parameters).gradient_norm()
    assert math.isnan(norm) if math.isnan(bad) else norm == math.inf


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@pytest.mark.parametrize("grad_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["float64", "amsgrad", "strided", "missing"])
def test_what_the_kernel_does_not_take_runs_on_torch(kind, grad_dtype, fused, monkeypatch):
    dtype = torch.float64 if kind == "float64" else torch.float32
    parameters = make(dtype, [(6, 4), (9,)])
    if kind == "strided":
        parameters[0] = torch.nn.Parameter(parameters[0].detach().t())
    if kind == "missing":
        monkeypatch.setattr(_native, "missing_reason", "not built")
    truth = doubles(parameters)
    options = {"amsgrad": kind == "amsgrad", "fused": fused}
    optimizer, expected = AdamW(parameters, **options), torch.optim.AdamW(truth, **options)
    for step in range(2):
        give_gradients(parameters, step, grad_dtype)
        gradients_like(truth, parameters)
        given = [p.grad for p in parameters]
        norm = torch.nn.utils.clip_grad_norm_(truth, 0.5).item()
        assert optimizer.gradient_norm() == pytest.approx(norm, rel=1e-6)
        optimizer.step(max_norm=0.5, norm=norm)
        expected.step()
        assert all(p.grad is grad for p, grad in zip(parameters, given, strict=True))
        assert all(p.grad.dtype == p.grad_dtype for p in parameters)
    for p, q in zip(parameters, truth, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-6, atol=1e-6)


def test_closure_and_parameters_without_gradient():
    first, second = make(shapes=[(3,), (4,)])
    untouched = second.detach().clone()
    optimizer = AdamW([first, second])

    def closure():
        loss = first.square().sum()
        loss.backward()
        return loss

    expected = first.detach().square().sum()
    assert torch.equal(optimizer.step(closure), expected)
    assert torch.equal(second, untouched)
    assert second not in optimizer.state
    optimizer.zero_grad()
    assert optimizer.gradient_norm() == 0
    optimizer.step(max_norm=1.0)


def test_schedulers_drive_it():
    (parameter,) = make(shapes=[(3,)])
    optimizer = AdamW([parameter], lr=1.0, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    parameter.grad = torch.ones(3)
    optimizer.step()
    scheduler.step()
    before = parameter.detach().clone()
    optimizer.step()
    assert torch.equal(parameter, before)


class Logged(torch.Tensor):
    """Notes what is done to it, as a subclass may do anything else."""

    calls: list

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("which", ["parameter", "gradient"])
def test_subclasses_take_torchs_step_beside_what_the_kernel_takes(which):
    torch.optim.AdamW(make(shapes=[(2,)]))  # from then on torch's own step calls the hooks, too
    Logged.calls = []
    parameters = make(shapes=[(6, 4), (9,)]) + make(torch.float64, [(5,)]) + make(shapes=[(3, 2)])
    if which == "parameter":
        parameters[-1] = torch.nn.Parameter(parameters[-1].detach().as_subclass(Logged))
    truth = [torch.nn.Parameter(p.detach().as_subclass(torch.Tensor).double().clone()) for p in parameters]
    optimizer, expected = AdamW(groups(parameters), lr=0.1), torch.optim.AdamW(groups(truth), lr=0.1)
    hooks = []
    optimizer.register_step_pre_hook(lambda *args: hooks.append("before"))
    optimizer.register_step_post_hook(lambda *args: hooks.append("after"))
    for step in range(3):
        give_gradients(parameters, step)
        if which == "gradient":
            parameters[-1].grad = parameters[-1].grad.as_subclass(Logged)
        for p, q in zip(parameters, truth, strict=True):
            q.grad = p.grad.as_subclass(torch.Tensor).double().clone()
        norm = torch.nn.utils.clip_grad_norm_(truth, 0.5).item()
        assert optimizer.gradient_norm() == pytest.approx(norm, rel=1e-6)
        Logged.calls = []
        optimizer.step(max_norm=0.5, norm=norm)
        assert any("mul" in func.__name__ for func in Logged.calls)
        expected.step()
    assert hooks == ["before", "after"] * 3
    for p, q in zip(parameters, truth, strict=True):
        torch.testing.assert_close(p.detach().as_subclass(torch.Tensor).double(), q, rtol=2e-6, atol=2e-6)


def _after_a_change(cls, change):
    """A parameter two steps on, between which `change` gives it or its moments another layout."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(6, 4).t())
    optimizer = torch.optim.AdamW([p], lr=0.1)
    p.grad = torch.randn(4, 6)
    optimizer.step()
    if change == "loaded":
        state, p = optimizer.state_dict(), torch.nn.Parameter(p.detach().contiguous())
        optimizer = cls([p], lr=0.1)
        optimizer.load_state_dict(state)
    else:
        optimizer.__class__ = cls
        p.data = p.detach().contiguous()
    p.grad = torch.randn(4, 6)
    optimizer.step()
    return p.detach()


@pytest.mark.parametrize("change", ["loaded", "replaced"])
def test_moments_of_another_layout_than_the_parameters(change):
    """Moments keep the strides that they were made or saved with."""
    expected = _after_a_change(torch.optim.AdamW, change)
    torch.testing.assert_close(_after_a_change(AdamW, change), expected, rtol=1e-6, atol=1e-6)


def test_moments_of_another_shape_are_refused_as_by_torch():
    small, large = torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(50))
    optimizer = torch.optim.AdamW([small])
    small.grad = torch.randn(3)
    optimizer.step()
    ours = AdamW([large])
    ours.load_state_dict(optimizer.state_dict())
    large.grad = torch.randn(50)
    with pytest.raises(RuntimeError, match="size"):
        ours.step()
