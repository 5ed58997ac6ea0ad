"""AdamW as a torch.optim.Optimizer whose step is the fused operator ``fastgpt.ops.adamw``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastgpt.ops.adamw import adamw, check_options, grad_norm
from fastgpt.ops.native import with_huge_pages


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, 2019) as torch.optim.AdamW computes it, with gradient clipping in the same call.

    Args:
        params: parameters, or groups of them, each with its own lr, betas, eps, weight_decay, maximize.
        max_grad_norm: clips the norm over the gradients of all groups, as torch.nn.utils.clip_grad_norm_ with that
            value before the step would; the gradients themselves stay as they are. None clips nothing.
        maximize: climbs instead of descending.
        backend: of ``fastgpt.ops.adamw``.

    ``grad_norm`` is the norm over all groups in the last step, before clipping: a 0-d tensor (None before the first
    step). With ``max_grad_norm``, a step whose norm is not finite changes nothing, its step count included.

    State per parameter, named as torch's: ``step``, ``exp_avg``, ``exp_avg_sq``. The averages of bfloat16 and float16
    parameters are float32, and these also have ``master``, a float32 copy that is made at the first step: from then
    on the parameter is its rounding, and values written into the parameter by others are lost.

    Raises:
        ValueError: a hyperparameter out of range. TypeError: a parameter that is not real floating point.
        RuntimeError: a sparse gradient.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        max_grad_norm: float | None = None,
        *,
        maximize: bool = False,
        backend: str | None = None,
    ) -> None:
        self.max_grad_norm = max_grad_norm
        self.backend = backend
        self.grad_norm: Tensor | None = None
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim.Optimizer's; checks the group's hyperparameters and dtypes."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_options(**_options(group), max_norm=self.max_grad_norm)
            for i, p in enumerate(group["params"]):
                if not p.is_floating_point() or p.layout != torch.strided:
                    raise TypeError(
                        f"AdamW: parameter {i} is {p.dtype}, {p.layout}; it must be dense and of a real floating dtype"
                    )
        except Exception:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, grad_scale: float = 1.0) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.
            grad_scale: gradients are divided by this first (the loss scale, or a count of tokens).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        # One call of the operator takes tensors that share a group, a device and a step count.
        calls: defaultdict[tuple[int, torch.device, int], list[Tensor]] = defaultdict(list)
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is not None:
                    calls[index, p.device, self._step_of(p)].append(p)
        norm = None
        if self.max_grad_norm is not None:
            by_device: defaultdict[torch.device, list[Tensor]] = defaultdict(list)
            for (_, device, _), params in calls.items():
                by_device[device] += [p.grad for p in params if p.grad is not None]
            norm = _combine([grad_norm(g, grad_scale=grad_scale, backend=self.backend) for g in by_device.values()])
            if not norm.isfinite():
                self.grad_norm = norm
                return loss

        norms = []
        for (index, device, step), params in calls.items():
            group = self.param_groups[index]
            states = [self.state[p] for p in params]
            norms.append(
                adamw(
                    params,
                    [p.grad for p in params if p.grad is not None],
                    [s["exp_avg"] for s in states],
                    [s["exp_avg_sq"] for s in states],
                    step=step + 1,
                    **_options(group),
                    max_norm=self.max_grad_norm,
                    total_norm=None if norm is None else norm.to(device),
                    master_params=[s.get("master") for s in states],
                    grad_scale=grad_scale,
                    maximize=group["maximize"],
                    backend=self.backend,
                )
            )
            torch._foreach_add_([s["step"] for s in states], 1)
        self.grad_norm = _combine(norms) if norm is None else norm
        return loss

    def _step_of(self, p: Tensor) -> int:
        """How many steps ``p`` has behind it; makes its state at the first."""
        assert p.grad is not None
        if p.grad.layout != torch.strided:
            raise RuntimeError(f"AdamW: a gradient is {p.grad.layout}; only dense gradients are taken")
        state = self.state[p]
        if not state:
            high = _state_dtype(p)
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            state["exp_avg"] = _empty_state(p).zero_()
            state["exp_avg_sq"] = _empty_state(p).zero_()
            if p.dtype != high:
                state["master"] = _empty_state(p).copy_(p.detach())
        return int(state["step"].item())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state_dict of this class or of torch.optim.AdamW; a missing ``master`` starts from the parameter.

        Raises:
            ValueError: groups that do not fit, a tensor of another shape, one that is missing, or amsgrad=True.
        """
        if any(group.get("amsgrad") for group in state_dict["param_groups"]):
            raise ValueError("AdamW: the state to load was made with amsgrad=True, which is not supported")
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved_ids, params, strict=False):  # unequal counts: the base class says so
            _check_saved(i, state_dict["state"].get(i), p)
        super().load_state_dict(state_dict)
        # The base class has rounded the state to the parameters' dtype: take it again in float32.
        for i, p in zip(saved_ids, params, strict=True):
            high = _state_dtype(p)
            saved = state_dict["state"].get(i)
            if saved and p.dtype != high:
                for name in ("exp_avg", "exp_avg_sq", "master"):
                    self.state[p][name] = _empty_state(p).copy_(saved.get(name, p.detach()))


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {
        "lr": float(group["lr"]),
        "betas": group["betas"],
        "eps": group["eps"],
        "weight_decay": group["weight_decay"],
    }


def _state_dtype(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def _empty_state(p: Tensor) -> Tensor:
    """In huge pages: small ones cost an eighth of the step, which reads and writes seven streams at a time."""
    return with_huge_pages(torch.empty_like(p, dtype=_state_dtype(p)), at_least=2 << 20)


def _combine(norms: list[Tensor]) -> Tensor:
    """The norm of parts whose norms are given, on the first one's device."""
    if len(norms) < 2:
        return norms[0] if norms else torch.zeros(())
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))


def _check_saved(i: int, saved: dict[str, Any] | None, p: Tensor) -> None:
    if not saved:
        return
    for name in ("step", "exp_avg", "exp_avg_sq"):
        if name not in saved:
            raise ValueError(f"AdamW: the saved state of parameter {i} has no {name!r}; it has {sorted(saved)}")
    for name in ("exp_avg", "exp_avg_sq", "master"):
        if name in saved and saved[name].shape != p.shape:
            raise ValueError(
                f"AdamW: the saved {name} of parameter {i} has shape {tuple(saved[name].shape)}; "
                f"the parameter has {tuple(p.shape)}"
            )
