import copy
import math

import pytest
import torch

import fastgpt
from tests.ops.harness import assert_within_budget

SHAPES = [(5, 7), (), (33,), (2, 3)]


def parameters(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in SHAPES]


def groups(params):
    return [
        {"params": params[:2], "weight_decay": 0.0},
        {"params": params[2:], "lr": 3e-2, "betas": (0.8, 0.95)},
    ]


def set_gradients(params, step, skip=()):
    generator = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator)
        p.grad = None if i in skip else grad.to(p.dtype)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("clip", [None, 1.5])
def test_as_torchs_adamw(clip, backend):
    ours, theirs = parameters(), parameters()
    optimizer = fastgpt.AdamW(groups(ours), lr=1e-2, max_grad_norm=clip, backend=backend)
    peer = torch.optim.AdamW(groups(theirs), lr=1e-2, foreach=False)
    for step in range(6):
        for params in (ours, theirs):
            set_gradients(params, step, skip=(1,) if step < 2 else ())  # a parameter that joins later
        expected = torch.nn.utils.clip_grad_norm_(theirs, clip or math.inf)
        optimizer.step()
        peer.step()
        torch.testing.assert_close(optimizer.grad_norm, expected)
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-7)
        for group in (*optimizer.param_groups, *peer.param_groups):
            group["lr"] *= 0.7
    assert int(optimizer.state[ours[1]]["step"]) == 4
    assert int(optimizer.state[ours[0]]["step"]) == 6


def test_the_state_has_torchs_structure_and_goes_both_ways():
    ours, theirs = parameters(), parameters()
    optimizer, peer = fastgpt.AdamW(groups(ours), lr=1e-2), torch.optim.AdamW(groups(theirs), lr=1e-2)
    for step in range(2):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        peer.step()
    mine, torchs = optimizer.state_dict(), peer.state_dict()
    assert {i: sorted(s) for i, s in mine["state"].items()} == {i: sorted(s) for i, s in torchs["state"].items()}
    assert mine["state"][0]["step"].dtype == torchs["state"][0]["step"].dtype
    swapped = fastgpt.AdamW(groups(ours), lr=1e-2)
    swapped.load_state_dict(torchs)
    torch.optim.AdamW(groups(theirs), lr=1e-2).load_state_dict(mine)
    set_gradients(ours, 2)
    swapped.step()
    assert int(swapped.state[ours[0]]["step"]) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_resuming_is_exact_to_the_bit(dtype):
    def train(params, optimizer, steps):
        for step in steps:
            set_gradients(params, step, skip=(1,) if step < 2 else ())
            optimizer.step()

    whole = parameters(dtype)
    optimizer = fastgpt.AdamW(groups(whole), lr=1e-2, max_grad_norm=1.0)
    train(whole, optimizer, range(7))

    first = parameters(dtype)
    optimizer_first = fastgpt.AdamW(groups(first), lr=1e-2, max_grad_norm=1.0)
    train(first, optimizer_first, range(3))
    saved = copy.deepcopy(optimizer_first.state_dict())
    second = [p.detach().clone().requires_grad_() for p in first]
    optimizer_second = fastgpt.AdamW(groups(second), lr=123.0, max_grad_norm=1.0)
    optimizer_second.load_state_dict(saved)
    train(second, optimizer_second, range(3, 7))

    for a, b in zip(whole, second, strict=True):
        assert torch.equal(a, b)
        for name, value in optimizer.state[a].items():
            resumed = optimizer_second.state[b][name]
            assert torch.equal(value, resumed), name
            assert value.dtype == resumed.dtype, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_follow_a_float32_master(dtype):
    ours = parameters(dtype)
    peers = [[p.detach().to(wide).requires_grad_() for p in ours] for wide in (torch.float32, torch.float64)]
    optimizers = [fastgpt.AdamW(ours, lr=1e-4), *(torch.optim.AdamW(p, lr=1e-4, foreach=False) for p in peers)]
    for step in range(20):
        set_gradients(ours, step)
        for peer in peers:
            for p, q in zip(ours, peer, strict=True):
                q.grad = p.grad.to(q.dtype)
        for optimizer in optimizers:
            optimizer.step()
    for p, plain, exact in zip(ours, *peers, strict=True):
        state = optimizers[0].state[p]
        assert all(state[name].dtype == torch.float32 for name in ("exp_avg", "exp_avg_sq", "master"))
        assert_within_budget("master", state["master"], plain.detach(), exact.detach())
        assert torch.equal(p.detach(), state["master"].to(dtype))


def test_a_norm_that_is_not_finite_skips_the_step():
    params = parameters()
    optimizer = fastgpt.AdamW(groups(params), lr=1e-2, max_grad_norm=1.0)
    set_gradients(params, 0)
    optimizer.step()
    before = copy.deepcopy((params, optimizer.state_dict()["state"]))
    set_gradients(params, 1)
    params[3].grad[0, 0] = math.nan
    optimizer.step()
    assert optimizer.grad_norm.isnan()
    torch.testing.assert_close(params, before[0], rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict()["state"], before[1], rtol=0, atol=0)


def test_gradients_are_divided_by_grad_scale():
    ours, theirs = parameters(), parameters()
    optimizer, peer = fastgpt.AdamW(ours, lr=1e-2), fastgpt.AdamW(theirs, lr=1e-2)
    set_gradients(ours, 0)
    set_gradients(theirs, 0)
    for p in ours:
        p.grad *= 1024
    optimizer.step(grad_scale=1024.0)
    peer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.grad_norm, peer.grad_norm)


def test_closures_schedulers_and_zero_grad():
    p = torch.ones(3, requires_grad=True)
    optimizer = fastgpt.AdamW([p], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    losses = []
    for _ in range(3):
        losses.append(optimizer.step(closure).item())
        scheduler.step()
    assert losses[0] > losses[1] > losses[2]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)
    optimizer.zero_grad()
    assert p.grad is None
    optimizer.step()  # nothing to do
    assert optimizer.grad_norm == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr=-1.0"),
        ({"betas": (1.0, 0.9)}, r"betas=\(1.0, 0.9\)"),
        ({"eps": -1.0}, r"eps=-1.0"),
        ({"weight_decay": math.inf}, r"weight_decay=inf"),
        ({"max_grad_norm": -1.0}, r"max_norm=-1.0; it must be > 0, or None"),
    ],
)
def test_bad_hyperparameters(options, message):
    with pytest.raises(ValueError, match=message):
        fastgpt.AdamW(parameters(), **options)


def test_parameters_and_gradients_that_are_refused():
    with pytest.raises(TypeError, match=r"parameter 0 is torch.complex64"):
        fastgpt.AdamW([torch.ones(2, dtype=torch.complex64, requires_grad=True)])
    weight = torch.ones(4, 2, requires_grad=True)
    optimizer = fastgpt.AdamW([weight])
    torch.nn.functional.embedding(torch.tensor([1]), weight, sparse=True).sum().backward()
    with pytest.raises(RuntimeError, match=r"a gradient is torch.sparse_coo; only dense gradients are taken"):
        optimizer.step()


def test_saved_states_that_are_refused():
    params = parameters()
    optimizer = fastgpt.AdamW(params)
    set_gradients(params, 0)
    optimizer.step()
    saved = optimizer.state_dict()

    def broken(change):
        other = copy.deepcopy(saved)
        change(other)
        return other

    fresh = fastgpt.AdamW(parameters())
    with pytest.raises(ValueError, match=r"saved state of parameter 2 has no 'exp_avg_sq'"):
        fresh.load_state_dict(broken(lambda s: s["state"][2].pop("exp_avg_sq")))
    with pytest.raises(ValueError, match=r"saved exp_avg of parameter 0 has shape \(2,\); the parameter has \(5, 7\)"):
        fresh.load_state_dict(broken(lambda s: s["state"][0].update(exp_avg=torch.ones(2))))
    with pytest.raises(ValueError, match=r"amsgrad=True"):
        fresh.load_state_dict(broken(lambda s: s["param_groups"][0].update(amsgrad=True)))
    assert not fresh.state
