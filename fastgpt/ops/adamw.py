"""adamw: one AdamW step over many tensors, in place (Loshchilov & Hutter, 2019, arXiv 1711.05101), with clipping.

    g = grad / grad_scale,  negated with maximize
    norm = sqrt(sum of g^2 over all tensors);  g = g * min(1, max_norm / (norm + 1e-6))  if max_norm is given
    m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2
    p = p (1 - lr weight_decay) - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)

as torch.optim.AdamW and torch.nn.utils.clip_grad_norm_ compute it. Gradients are only read: they are neither scaled nor
clipped in memory. ``grad_norm`` belongs to this operator: the norm alone, for an optimizer with several calls to make.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw  # torch.optim hides its module adamw

from fastgpt.ops import checks, native, registry
from fastgpt.ops.native import DTYPES, Kernels, unsupported_dtype
from fastgpt.ops.numerics import accumulate


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    max_norm: float | None = None,
    total_norm: Tensor | None = None,
    master_params: Sequence[Tensor | None] | None = None,
    grad_scale: float = 1.0,
    maximize: bool = False,
    backend: str | None = None,
) -> Tensor:
    """One step of AdamW on every tensor of ``params``, in place.

    Args:
        params: float32, bfloat16, float16 (float64 on the reference), any shapes, one device. Also changed in place:
            ``exp_avgs``, ``exp_avg_sqs``, ``master_params``.
        grads: of the parameters' shapes; of the parameter's dtype or float32.
        exp_avgs, exp_avg_sqs: of the parameters' shapes, float32 (float64 for float64 parameters).
        step: 1 for the first step, as bias correction counts.
        lr, betas, eps, weight_decay: as torch.optim.AdamW's.
        max_norm: clips the gradients' global norm to this.
        total_norm: the norm to clip by, a 0-d tensor as from ``grad_norm``, when other gradients count as well.
        master_params: float32 copies of the bfloat16 and float16 parameters; None for any other, or for one without.
            The copy is updated, and the parameter becomes its rounding.
        grad_scale: gradients are divided by this first (the loss scale, or a count of tokens).
        maximize: climbs instead of descending.
        backend: see ``fastgpt.ops``; "torch" is torch.optim's function, on float32 copies of low-precision parameters.

    Returns:
        The global norm of ``grads / grad_scale`` before clipping (``total_norm`` if that is given): 0-d, float32,
        or float64 for float64 parameters.

    A norm that is not finite: with ``max_norm``, nothing is updated, and the norm returned says why. Without, the norm
    is not known before the update, and NaN and infinities go into the parameters, as in torch.optim.AdamW.
    """
    masters = _check(params, grads, exp_avgs, exp_avg_sqs, master_params, total_norm)
    beta1, beta2 = betas
    check_options(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, max_norm=max_norm)
    if step < 1:
        raise ValueError(f"adamw: step={step}; the first step is 1")
    if not (grad_scale > 0 and math.isfinite(grad_scale)):
        raise ValueError(f"adamw: grad_scale={grad_scale}; it must be positive and finite")
    if total_norm is not None and max_norm is None:
        raise ValueError("adamw: total_norm is given without max_norm, so there is nothing to clip to")
    device = params[0].device if params else torch.device("cpu")
    refusal = _refusal(params, exp_avgs, exp_avg_sqs, masters)
    chosen = registry.resolve("adamw", backend, device, refusal)
    if not params:
        return torch.zeros(()) if total_norm is None else total_norm.detach().clone()
    options = (total_norm, step, lr, beta1, beta2, eps, weight_decay, max_norm, grad_scale, maximize)
    with torch.no_grad():
        if chosen == "torch":
            return torch_eager(params, grads, exp_avgs, exp_avg_sqs, masters, *options)
        return _op(list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), masters, *options, chosen)


def grad_norm(grads: Sequence[Tensor], *, grad_scale: float = 1.0, backend: str | None = None) -> Tensor:
    """The Euclidean norm of all ``grads / grad_scale`` together: 0-d, float32 (float64 if a gradient is float64).

    As ``torch.nn.utils.get_total_norm``. Squares are summed in float64 and in an order that depends on shapes alone.
    """
    for i, grad in enumerate(grads):
        _dense(f"grads[{i}]", grad)
    if not grads:
        return torch.zeros(())
    for i, grad in enumerate(grads):
        if grad.device != grads[0].device:
            raise ValueError(f"adamw: grads[{i}] is on {grad.device}, but grads[0] is on {grads[0].device}")
    chosen = registry.resolve("adamw", backend, grads[0].device, unsupported_dtype(*grads))
    with torch.no_grad():
        if chosen == "torch":
            return torch.nn.utils.get_total_norm(grads) / grad_scale
        return _op_norm(list(grads), grad_scale, chosen)


# --- checks ---


def check_options(
    *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, max_norm: float | None
) -> None:
    """Hyperparameters within what AdamW is defined for."""
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"adamw: {name}={value}; it must be finite and >= 0")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"adamw: betas={betas}; it must be two numbers in [0, 1)")
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"adamw: max_norm={max_norm}; it must be > 0, or None for no clipping")


# The dtype of a parameter's averages and master.
_STATE = {dtype: torch.float64 if dtype == torch.float64 else torch.float32 for dtype in checks.FLOATING}


def _dense(name: str, tensor: Tensor) -> None:
    if isinstance(tensor, Tensor) and tensor.layout != torch.strided:
        raise TypeError(f"adamw: {name} is {tensor.layout}; only dense tensors are taken")
    checks.floating("adamw", name, tensor)


def _fits(tensor: Tensor | None, param: Tensor, dtypes: tuple[torch.dtype, ...]) -> bool:
    return (
        isinstance(tensor, Tensor)
        and tensor.dtype in dtypes
        and tensor.shape == param.shape
        and tensor.device == param.device
        and tensor.layout == torch.strided
    )


def _explain_misfit(
    name: str, tensor: Tensor | None, param_name: str, param: Tensor, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Raises the error for a tensor that does not fit."""
    _dense(name, tensor)  # type: ignore[arg-type]  # refuses None
    assert tensor is not None
    if tensor.shape != param.shape:
        raise ValueError(f"adamw: {name} has shape {tuple(tensor.shape)}; {param_name} has {tuple(param.shape)}")
    if tensor.device != param.device:
        raise ValueError(f"adamw: {name} is on {tensor.device}, but {param_name} is on {param.device}")
    if not dtypes:
        raise TypeError(f"adamw: {param_name} is {param.dtype} and takes no master: {name} must be None")
    allowed = " or ".join(str(d) for d in dict.fromkeys(dtypes))
    raise TypeError(f"adamw: {name} is {tensor.dtype}; for a parameter of {param.dtype} it must be {allowed}")


def _check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    master_params: Sequence[Tensor | None] | None,
    total_norm: Tensor | None,
) -> list[Tensor]:
    """Checks the lists against each other; returns the masters with an empty tensor in place of None."""
    masters: Sequence[Tensor | None] = [None] * len(params) if master_params is None else master_params
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "master_params": masters}
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"adamw: {name} has {len(tensors)} tensors; it must have {len(params)}, as params has")
    for i, (param, *others) in enumerate(zip(params, *lists.values(), strict=True)):
        if not (isinstance(param, Tensor) and param.dtype in _STATE and param.layout == torch.strided):
            _dense(f"params[{i}]", param)
        if param.device != params[0].device:
            raise ValueError(f"adamw: params[{i}] is on {param.device}, but params[0] is on {params[0].device}")
        state = _STATE[param.dtype]
        dtypes = ((param.dtype, state), (state,), (state,), () if param.dtype == state else (state,))
        for name, tensor, allowed in zip(lists, others, dtypes, strict=True):
            if not _fits(tensor, param, allowed) and not (tensor is None and name == "master_params"):
                _explain_misfit(f"{name}[{i}]", tensor, f"params[{i}]", param, allowed)
    if total_norm is not None and (total_norm.dim() != 0 or (params and total_norm.device != params[0].device)):
        raise ValueError(
            f"adamw: total_norm has shape {tuple(total_norm.shape)} and is on {total_norm.device}; it must be 0-d, on "
            "the parameters' device"
        )
    none = params[0].new_empty(0, dtype=torch.float32) if params else torch.empty(0)
    return [none if master is None else master for master in masters]


def _refusal(
    params: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor], masters: Sequence[Tensor]
) -> str | None:
    """Why the fused kernel does not take these tensors, or None."""
    for i, (p, m, v, master) in enumerate(zip(params, exp_avgs, exp_avg_sqs, masters, strict=True)):
        if p.is_contiguous() and m.is_contiguous() and v.is_contiguous() and master.is_contiguous():
            continue
        # An elementwise update takes any order of elements in memory, but it must be one order, without holes.
        state = (m, v, master) if master.shape == p.shape else (m, v)
        if torch.empty_like(p).stride() != p.stride() or any(s.stride() != p.stride() for s in state):
            return f"memory with holes, or a state laid out unlike its parameter (params[{i}])"
    return unsupported_dtype(*params)


# --- torch ---


def torch_eager(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    total_norm: Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_norm: float | None,
    grad_scale: float,
    maximize: bool,
) -> Tensor:
    """torch.optim's function and clip_grad_norm_'s formula, on copies of the gradients."""
    work = [
        p if p.dtype == m.dtype else (master if master.numel() else p.to(m.dtype))
        for p, m, master in zip(params, exp_avgs, masters, strict=True)
    ]
    scaled = [g.to(m.dtype) / grad_scale for g, m in zip(grads, exp_avgs, strict=True)]
    norm = torch.nn.utils.get_total_norm(scaled) if total_norm is None else total_norm.clone()
    if max_norm is not None:
        if not norm.isfinite():
            return norm
        torch._foreach_mul_(scaled, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    torch_adamw(
        work,
        scaled,
        list(exp_avgs),
        list(exp_avg_sqs),
        [],
        [torch.tensor(float(step - 1)) for _ in params],
        foreach=False,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=maximize,
    )
    for p, w in zip(params, work, strict=True):
        if p is not w:
            p.copy_(w)
    return norm


# --- reference ---


def reference_norm(grads: Sequence[Tensor], grad_scale: float) -> Tensor:
    squares = torch.stack([g.double().square().sum() for g in grads])
    return (squares.sum().sqrt() / grad_scale).to(_norm_dtype(grads))


def _norm_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    total_norm: Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_norm: float | None,
    grad_scale: float,
    maximize: bool,
) -> Tensor:
    """The formulas of the module's docstring; an empty master means none."""
    norm = reference_norm(grads, grad_scale) if total_norm is None else total_norm.clone()
    factor = torch.ones_like(norm)
    if max_norm is not None:
        if not norm.isfinite():
            return norm
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    factor = (-factor if maximize else factor) / grad_scale
    step_size = lr / (1 - beta1**step)
    root_correction = math.sqrt(1 - beta2**step)
    for param, grad, m, v, master in zip(params, grads, exp_avgs, exp_avg_sqs, masters, strict=True):
        if not param.numel():
            continue
        p = master if master.numel() else accumulate(param)
        g = accumulate(grad) * factor
        m.mul_(beta1).add_(g * (1 - beta1))
        v.mul_(beta2).add_(g.square() * (1 - beta2))
        p.mul_(1 - lr * weight_decay).sub_(step_size * m / (v.sqrt() / root_correction + eps))
        if p is not param:
            param.copy_(p)
    return norm


# --- kernels ---


def _dtypes(tensors: Sequence[Tensor]) -> list[int]:
    return [DTYPES[t.dtype] for t in tensors]


def _sizes(tensors: Sequence[Tensor]) -> list[int]:
    return [t.numel() for t in tensors]


def _native_norm(kernels: Kernels, grads: Sequence[Tensor], grad_scale: float) -> Tensor:
    grads = [g if g.is_contiguous() else g.contiguous() for g in grads]
    norm = grads[0].new_empty((), dtype=torch.float32)
    kernels.grad_norm(
        norm=norm,
        grads=grads,
        sizes=_sizes(grads),
        grad_dtypes=_dtypes(grads),
        count=len(grads),
        grad_scale=grad_scale,
    )
    return norm


def _native(
    kernels: Kernels,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    total_norm: Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_norm: float | None,
    grad_scale: float,
    maximize: bool,
) -> Tensor:
    grads = [
        g if g.stride() == p.stride() else torch.empty_like(p, dtype=g.dtype).copy_(g)
        for p, g in zip(params, grads, strict=True)
    ]
    norm = params[0].new_empty((), dtype=torch.float32)
    total = None if total_norm is None else total_norm.float()
    changed = [t.data_ptr() for tensors in (params, exp_avgs, exp_avg_sqs, masters) for t in tensors if t.numel()]
    if len(set(changed)) != len(changed):
        raise ValueError("adamw: two of the tensors to change are the same memory; each must be its own")
    kernels.adamw(
        params=params,
        grads=grads,
        exp_avgs=exp_avgs,
        exp_avg_sqs=exp_avg_sqs,
        masters=masters,
        sizes=_sizes(params),
        param_dtypes=_dtypes(params),
        grad_dtypes=_dtypes(grads),
        count=len(params),
        norm=norm,
        total_norm=total,
        step=step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        max_norm=0.0 if max_norm is None else max_norm,
        grad_scale=grad_scale,
        maximize=maximize,
    )
    # Autograd must notice that these have changed.
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *masters])
    return norm


# --- registration ---


def _fake(params: Sequence[Tensor], *_: object) -> Tensor:
    return params[0].new_empty((), dtype=_norm_dtype(params))


def _fake_norm(grads: Sequence[Tensor], grad_scale: float) -> Tensor:
    return grads[0].new_empty((), dtype=_norm_dtype(grads))


_op = registry.define(
    "adamw",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] masters,"
    " Tensor? total_norm, SymInt step, float lr, float beta1, float beta2, float eps, float weight_decay,"
    " float? max_norm, float grad_scale, bool maximize) -> Tensor",
    {"reference": reference, **native.backends(_native)},
    _fake,
)
_op_norm = registry.define(
    "grad_norm",
    "(Tensor[] grads, float grad_scale) -> Tensor",
    {"reference": reference_norm, **native.backends(_native_norm)},
    _fake_norm,
)
