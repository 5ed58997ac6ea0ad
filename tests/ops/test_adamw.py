import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgpt
from tests import triton_runner
from tests.ops import harness
from tests.ops.harness import ops

BACKENDS = harness.backends("adamw")
# Chunks of the CPU kernel hold 16384 elements, of CUDA's 8192: below, at and over one, and odd sizes.
SHAPES = [(5, 123), (), (16384,), (3, 5461, 1), (16385,), (0, 4), (7,), (40001,)]
# (parameter, gradient, has a master)
DTYPES = [
    (torch.float32, torch.float32, False),
    (torch.bfloat16, torch.bfloat16, True),
    (torch.bfloat16, torch.float32, False),
    (torch.float16, torch.float16, True),
    (torch.float16, torch.float16, False),
]
OPTIONS = [
    {},
    {"max_norm": 1.0},
    {"max_norm": 1e6, "weight_decay": 0.0},
    {"max_norm": 0.5, "grad_scale": 8.0, "maximize": True},
    {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.3, "lr": 0.5},
]


class State:
    """Parameters with everything a step needs; ``wide`` holds all of it in float64."""

    def __init__(self, shapes, dtype=torch.float32, master=False, wide=False, seed=0):
        generator = torch.Generator().manual_seed(seed)
        start = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
        state = torch.float64 if wide else torch.float32
        self.params = [p.to(state) if wide else p.clone() for p in start]
        self.exp_avgs = [torch.zeros(p.shape, dtype=state) for p in start]
        self.exp_avg_sqs = [torch.zeros(p.shape, dtype=state) for p in start]
        self.masters = [p.float() for p in start] if master and not wide else None

    def step(self, grads, **options):
        if self.params[0].dtype == torch.float64:
            grads = [g.double() for g in grads]
        options = {"lr": 1e-2, **options}
        return ops.adamw(self.params, grads, self.exp_avgs, self.exp_avg_sqs, master_params=self.masters, **options)

    def tensors(self):
        named = {"params": self.params, "exp_avgs": self.exp_avgs, "exp_avg_sqs": self.exp_avg_sqs}
        return {**named, "masters": self.masters} if self.masters else named


def gradients(shapes, steps, dtype=torch.float32, scale=1.0, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [[(torch.randn(s, generator=generator) * scale).to(dtype) for s in shapes] for _ in range(steps)]


def check(backend, shapes, dtype, grad_dtype, master, steps=4, scale=1.0, together=False, **options):
    """``together``: the budget is that of all tensors as one; torch is exact by chance in some small ones."""
    ours, plain = State(shapes, dtype, master), State(shapes, dtype, master)
    exact = State(shapes, dtype, master, wide=True)
    for step, grads in enumerate(gradients(shapes, steps, grad_dtype, scale), 1):
        before = [g.clone() for g in grads]
        norms = [
            state.step(grads, step=step, backend=b, **options)
            for state, b in ((ours, backend), (plain, "torch"), (exact, "torch"))
        ]
        assert all(torch.equal(g, b) for g, b in zip(grads, before, strict=True)), "gradients were changed"
        assert norms[0].dtype == torch.float32
        assert norms[0].shape == ()
        harness.assert_within_budget("norm", norms[0], norms[1], norms[2].double())
    wide = exact.tensors()
    for name, tensors in ours.tensors().items():
        lists = [tensors, plain.tensors()[name], wide["params" if name == "masters" else name]]
        if together:
            lists = [[torch.cat([t.flatten() for t in tensors])] for tensors in lists]
        for i, (a, p, e) in enumerate(zip(*lists, strict=True)):
            harness.assert_within_budget(f"{name}[{i}]", a, p, e)
    for p, m in zip(ours.params, ours.masters or [], strict=bool(ours.masters)):
        assert torch.equal(p, m.to(p.dtype)), "a parameter is not its rounded master"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("dtype", "grad_dtype", "master"), DTYPES)
def test_against_torch(dtype, grad_dtype, master, options, backend):
    check(backend, SHAPES, dtype, grad_dtype, master, **options)


@pytest.mark.parametrize(("dtype", "grad_dtype", "master"), DTYPES)
def test_every_instruction_set(isa, dtype, grad_dtype, master):
    for options in ({}, {"max_norm": 1.0}):
        check("cpu", [(3, 37), (64,), (1,)], dtype, grad_dtype, master, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e4, 1e-15, 1e-30])
def test_extreme_gradients(scale, backend):
    check(backend, [(50,), (3, 7)], torch.float32, torch.float32, False, scale=scale)


@pytest.mark.parametrize("backend", BACKENDS)
def test_subnormal_gradients(backend):
    states = {b: State([(50,)]) for b in (backend, "torch")}
    for step, grads in enumerate(gradients([(50,)], 4, scale=1e-40), 1):
        for b, state in states.items():
            state.step(grads, step=step, backend=b)
    # Below 2^-126 a rounding is half of 2^-149, whatever the value: two for each step.
    torch.testing.assert_close(states[backend].exp_avgs, states["torch"].exp_avgs, rtol=0, atol=4 * 2.0**-149)
    torch.testing.assert_close(states[backend].params, states["torch"].params)


@pytest.mark.parametrize("backend", BACKENDS)
def test_squares_that_overflow_float32_do_not_spoil_the_norm(backend):
    grads = [torch.tensor([3e30, -4e30])]
    torch.testing.assert_close(ops.grad_norm(grads, backend=backend), torch.tensor(5e30))
    tiny = [torch.tensor([3e-30, -4e-30])]
    torch.testing.assert_close(ops.grad_norm(tiny, backend=backend), torch.tensor(5e-30), atol=0, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"max_norm": 0.3}])
def test_many_small_tensors(options, backend):
    """More than CUDA's 64 a launch and Triton's 16, with empty ones between."""
    shapes = [(i * 37 % 50,) for i in range(80)]
    check(backend, shapes, torch.float16, torch.float16, True, steps=2, together=True, **options)
    grads = gradients(shapes, 1)[0]
    exact = torch.cat([g.double() for g in grads]).norm()
    torch.testing.assert_close(ops.grad_norm(grads, backend=backend).double(), exact, rtol=1e-7, atol=0)


@pytest.mark.skipif(triton_runner.RUNNER == "interpreter", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b == "triton"])
def test_one_compilation_serves_every_list(backend):
    """Triton specialises on integers that are 1 or multiples of 16: of a tuple too, whatever it is told."""
    from fastgpt.kernels import compile, launch

    with launch.recording() as launches:
        for sizes in ([768] * 20, [1, 16 * 8192], [33, 5]):
            State([(n,) for n in sizes]).step(gradients([(n,) for n in sizes], 1)[0], step=1, backend=backend)
    target = compile.target_of("sm_80")
    keys = {v.key for r in launches if r.kernel.__name__ == "adamw_kernel" for v in compile.variants(r, target)}
    assert len(keys) == 1


@pytest.mark.parametrize("backend", ["cpu", *harness.asynchronous_backends("adamw")])
@pytest.mark.parametrize(("dtype", "grad_dtype", "master"), DTYPES)
def test_bits_do_not_depend_on_alignment(dtype, grad_dtype, master, backend):
    """Of any of the tensors: an element is updated alike whether its neighbours come in one access with it or not."""
    whole = State([(1003,)], dtype, master)
    grads = gradients([(1003,)], 1, grad_dtype)[0]
    results = []
    for moved in (None, "params", "grads", "exp_avgs", "exp_avg_sqs", "masters"):
        lists = {**{n: [t.clone() for t in ts] for n, ts in whole.tensors().items()}, "grads": [grads[0].clone()]}
        if moved in lists:
            room = torch.empty(1004, dtype=lists[moved][0].dtype)
            lists[moved] = [room[1:].copy_(lists[moved][0])]
        norm = ops.adamw(
            lists["params"],
            lists["grads"],
            lists["exp_avgs"],
            lists["exp_avg_sqs"],
            master_params=lists.get("masters"),
            step=3,
            lr=0.1,
            backend=backend,
        )
        results.append([norm.reshape(1), *(t[0].clone() for t in lists.values())])
    harness.assert_same_bits([r[1:] for r in results], "alignment changes the update")
    torch.testing.assert_close([r[0] for r in results[1:]], [results[0][0]] * 5, rtol=1e-7, atol=0)


def test_bits_do_not_depend_on_the_schedule(emulated_schedules):
    results = []
    for _ in emulated_schedules():
        state = State(SHAPES, torch.bfloat16, master=True)
        norm = state.step(gradients(SHAPES, 1, torch.bfloat16)[0], step=1, max_norm=1.0, backend="simt")
        results.append([norm.reshape(1), *(t.reshape(-1) for tensors in state.tensors().values() for t in tensors)])
    harness.assert_same_bits(results, "the order in which threads run changes the result")


@pytest.mark.parametrize("backend", BACKENDS)
def test_against_the_optimizer_and_clip_grad_norm(backend):
    shapes = [(5, 7), (), (33,)]
    ours = State(shapes)
    leaves = [p.clone().requires_grad_() for p in ours.params]
    peer = torch.optim.AdamW(leaves, lr=1e-2, betas=(0.8, 0.99), weight_decay=0.1, foreach=False)
    for step, grads in enumerate(gradients(shapes, 5), 1):
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad.clone()
        expected = torch.nn.utils.clip_grad_norm_(leaves, 2.0)
        peer.step()
        norm = ours.step(grads, step=step, betas=(0.8, 0.99), weight_decay=0.1, max_norm=2.0, backend=backend)
        torch.testing.assert_close(norm, expected)
        torch.testing.assert_close(ours.params, [leaf.detach() for leaf in leaves], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_norm(backend):
    grads = [torch.randn(40001), torch.randn(3, 5).bfloat16(), torch.randn(()), torch.randn(6, 4).T, torch.randn(0)]
    exact = torch.cat([g.double().flatten() for g in grads]).norm()
    torch.testing.assert_close(ops.grad_norm(grads, backend=backend).double(), exact, rtol=1e-7, atol=0)
    torch.testing.assert_close(ops.grad_norm(grads, grad_scale=4.0, backend=backend).double(), exact / 4)
    assert ops.grad_norm([]) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_given_decides_the_clipping(backend):
    grads = gradients([(9,)], 1)[0]
    states = [State([(9,)]), State([(9,)])]
    returned = states[0].step(grads, step=1, eps=1.0, max_norm=1.0, total_norm=torch.tensor(100.0), backend=backend)
    states[1].step([g * (1 / (100 + 1e-6)) for g in grads], step=1, eps=1.0, backend=backend)
    assert returned == 100
    torch.testing.assert_close(states[0].params, states[1].params)


@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_changes_nothing_when_clipping(bad, backend):
    shapes = [(5,), (3, 4)]
    state, untouched = State(shapes), State(shapes)
    grads = gradients(shapes, 1)[0]
    grads[1][2, 1] = bad
    norm = state.step(grads, step=1, max_norm=1.0, backend=backend)
    assert not norm.isfinite()
    for name, tensors in state.tensors().items():
        torch.testing.assert_close(tensors, untouched.tensors()[name], rtol=0, atol=0)
    assert not state.step(grads, step=1, backend=backend).isfinite()
    assert state.params[1][2, 1].isnan()  # as in torch.optim.AdamW
    assert state.params[0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_order_in_memory(backend):
    ours, plain = State([(6, 8)]), State([(6, 8)])
    for tensors in ours.tensors().values():
        tensors[0] = tensors[0].T.contiguous().T
    grads = gradients([(6, 8)], 1)[0]
    for state in (ours, plain):
        state.step(grads, step=1, backend=backend)
    assert torch.equal(ours.params[0], plain.params[0])


def test_memory_with_holes_goes_to_the_reference_openly():
    state = State([(6, 8)])
    wide = torch.randn(6, 16)
    state.params = [wide[:, ::2]]
    expected = State([(6, 8)])
    expected.params = [wide[:, ::2].clone()]
    grads = gradients([(6, 8)], 1)[0]
    with fastgpt.strict(), pytest.raises(fastgpt.FallbackError, match=r"memory with holes.*params\[0\]"):
        state.step(grads, step=1)
    state.step(grads, step=1)
    expected.step(grads, step=1)
    torch.testing.assert_close(state.params, expected.params)


def test_bits_do_not_depend_on_threads_or_on_the_cut_into_tensors(restore_threads):
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        state = State(SHAPES)
        norm = state.step(gradients(SHAPES, 1)[0], step=1, max_norm=1.0)
        results.append([norm.reshape(1), *(p.reshape(-1) for p in state.params + state.exp_avg_sqs)])
    harness.assert_same_bits(results, "the thread count changes the result")
    whole, cut = State([(40001,)]), State([(40001,)])
    grads = gradients([(40001,)], 1)[0]
    whole.step(grads, step=1)
    for name, tensors in cut.tensors().items():
        setattr(cut, name, list(tensors[0].split(1001)))
    cut.step(list(grads[0].split(1001)), step=1)
    harness.assert_same_bits([whole.params, [torch.cat(cut.params)]], "the cut changes the result")


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration(backend):
    def arguments():
        state = State([(3, 4), (5,)], torch.bfloat16, master=True)
        grads = gradients([(3, 4), (5,)], 1, torch.bfloat16)[0]
        lists = (state.params, grads, state.exp_avgs, state.exp_avg_sqs, state.masters)
        return (*lists, None, 1, 0.1, 0.9, 0.99, 1e-8, 0.1, 1.0, 1.0, False, backend)

    harness.opcheck("adamw", arguments())
    harness.opcheck("grad_norm", (gradients([(3, 4), (5,)], 1)[0], 2.0, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_notices_the_change(backend):
    state = State([(4,)])
    p = state.params[0].requires_grad_()
    loss = p.square().sum()
    state.step([torch.ones(4)], step=1, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_compiles_without_graph_breaks():
    states = [State([(3, 4), (5,)]), State([(3, 4), (5,)])]
    grads = gradients([(3, 4), (5,)], 1)[0]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(params, grads, exp_avgs, exp_avg_sqs):
        return ops.adamw(params, grads, exp_avgs, exp_avg_sqs, step=1, lr=0.1, max_norm=1.0, backend="cpu")

    norms = [
        compiled(states[0].params, grads, states[0].exp_avgs, states[0].exp_avg_sqs),
        states[1].step(grads, step=1, lr=0.1, max_norm=1.0, backend="cpu"),
    ]
    harness.assert_same_bits([[n.reshape(1), *s.params] for n, s in zip(norms, states, strict=True)], "differs")


def test_float64_goes_to_the_reference_openly():
    state = State([(3,)], wide=True)
    assert state.step([torch.ones(3)], step=1).dtype == torch.float64
    assert any(name == "adamw" and "float64" in why for name, why in fastgpt.fallbacks())
    with fastgpt.strict(), pytest.raises(fastgpt.FallbackError, match=r"adamw.*float64"):
        state.step([torch.ones(3)], step=2)


def test_no_parameters():
    assert ops.adamw([], [], [], [], step=1, lr=0.1, max_norm=1.0) == 0


T = torch.ones(3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grads": []}, ValueError, r"grads has 0 tensors; it must have 1"),
        ({"grads": [torch.ones(4)]}, ValueError, r"grads\[0\] has shape \(4,\); params\[0\] has \(3,\)"),
        ({"grads": [T.bfloat16()]}, TypeError, r"grads\[0\] is torch.bfloat16; for a parameter of torch.float32"),
        ({"grads": [None]}, TypeError, r"grads\[0\] must be a Tensor, not NoneType"),
        ({"grads": [T.to_sparse()]}, TypeError, r"grads\[0\] is torch.sparse_coo; only dense"),
        ({"grads": [T.to("meta")]}, ValueError, r"grads\[0\] is on meta, but params\[0\] is on cpu"),
        ({"params": [T.to(torch.complex64)]}, TypeError, r"params\[0\] has dtype torch.complex64"),
        ({"exp_avgs": [T.bfloat16()]}, TypeError, r"exp_avgs\[0\] is torch.bfloat16; .*must be torch.float32"),
        ({"master_params": [T]}, TypeError, r"params\[0\] is torch.float32 and takes no master"),
        ({"step": 0}, ValueError, r"step=0; the first step is 1"),
        ({"lr": -1.0}, ValueError, r"lr=-1.0; it must be finite and >= 0"),
        ({"lr": math.nan}, ValueError, r"lr=nan"),
        ({"eps": -1e-8}, ValueError, r"eps=-1e-08"),
        ({"weight_decay": -0.1}, ValueError, r"weight_decay=-0.1"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas=\(0.9, 1.0\); it must be two numbers in \[0, 1\)"),
        ({"max_norm": 0.0}, ValueError, r"max_norm=0.0; it must be > 0, or None"),
        ({"grad_scale": 0.0}, ValueError, r"grad_scale=0.0; it must be positive"),
        ({"total_norm": torch.tensor(1.0)}, ValueError, r"total_norm is given without max_norm"),
        ({"max_norm": 1.0, "total_norm": torch.ones(2)}, ValueError, r"total_norm has shape \(2,\).*0-d"),
        ({"backend": "gpu"}, ValueError, r"backend='gpu' is unknown"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {name: [torch.ones(3)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    with pytest.raises(error, match=rf"adamw: .*{message}"):
        ops.adamw(**{**arguments, "step": 1, "lr": 0.1, **change})


def test_one_memory_given_twice_is_an_error():
    with pytest.raises(ValueError, match="two of the tensors to change are the same memory"):
        ops.adamw([T, T], [T, T], [T + 0, T + 0], [T + 0, T + 0], step=1, lr=0.1)


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=2), min_size=1, max_size=4),
    step=st.integers(1, 10**6),
    clip=st.none() | st.floats(1e-3, 1e3),
    maximize=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_list_is_updated_as_the_reference_does(shapes, step, clip, maximize, dtype):
    param_dtype, grad_dtype, master = dtype
    states = {b: State(shapes, param_dtype, master) for b in ("cpu", "reference")}
    grads = gradients(shapes, 1, grad_dtype)[0]
    norms = [s.step(grads, step=step, max_norm=clip, maximize=maximize, backend=b) for b, s in states.items()]
    torch.testing.assert_close(norms[0], norms[1])
    for name, tensors in states["cpu"].tensors().items():
        torch.testing.assert_close(tensors, states["reference"].tensors()[name])
