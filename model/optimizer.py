"""Turning gradients into new weights: AdamW, its parameter groups, the learning-rate schedule, gradient clipping.

AdamW makes bit for bit the steps of torch.optim.AdamW(foreach=True), and its whole state is tensors and one number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

BLOCK_ELEMENTS = 2**16
"""Numbers of a tensor that all operations of an update go over before the next ones, on a CPU.

Nine operations over whole tensors are nine ways through main memory; a block's four arrays, 1 MiB, stay in the cache.
"""


def _identity(tensor: Tensor) -> Tensor:
    return tensor


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (arXiv 1711.05101, algorithm 2) and bias correction.

    State per parameter: "exp_avg" and "exp_avg_sq", made by zeros_like, so they are sharded as the parameter is. The
    number of updates done is one plain int, `num_steps`, stored as "step" in each group; a checkpoint is therefore the
    state's tensors and that number. To load: init_state(), copy into the tensors, set num_steps. Torch's state_dict()
    and load_state_dict() work too.

    Args:
        params: parameters, or groups {"params", "lr", "betas", "eps", "weight_decay"} as for any torch optimizer; a
            group's "lr_ratio", 1 if it has none, is for the caller: its rate as a multiple of the schedule's.
        lr: learning rate; a schedule sets group["lr"] to a float before each step.
        betas: decay of the mean gradient and of the mean squared gradient, each in [0, 1).
        eps: added to the root of the corrected mean squared gradient.
        weight_decay: share of a weight taken off per step and unit of learning rate.
        local_part: from a tensor that is spread over processes to this process's part, sharing its memory.
        compile: update each tensor in one pass, by a kernel that torch.compile makes of adam_kernel. Equal within
            rounding, no longer bit for bit; the same bits in every run.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        local_part: Callable[[Tensor], Tensor] = _identity,
        compile: bool = False,
    ) -> None:
        self.local_part = local_part
        self.kernel = torch.compile(adam_kernel, dynamic=True) if compile else None
        defaults = {"lr": lr, "lr_ratio": 1.0, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0}
        super().__init__(params, defaults)
        for group in self.param_groups:
            _check_group(group)

    @property
    def num_steps(self) -> int:
        """Updates done so far; bias correction depends on it."""
        return int(self.param_groups[0]["step"])

    @num_steps.setter
    def num_steps(self, value: int) -> None:
        for group in self.param_groups:
            group["step"] = value

    def init_state(self) -> None:
        """Makes zero moments for parameters that have none yet; step() does so itself, loading needs it earlier."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, allowed: Tensor | None = None
    ) -> float | None:
        """One update of every parameter; ValueError where one has no gradient: the shared count would be wrong for it.

        Args:
            closure: computes the loss and the gradients afresh, as in torch; seldom needed.
            allowed: () bool beside the parameters; where it is False, weights and moments stay as they are, bit for
                bit, whatever the gradients hold. Compiled, nothing waits for its value, and num_steps counts the
                step all the same: the caller sets it back. Not compiled, the process looks at it.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.init_state()
        if allowed is not None and self.kernel is None:
            if not allowed.item():
                return loss
            allowed = None
        for group in self.param_groups:
            self._update(group, allowed)
        return loss

    def _update(self, group: dict[str, Any], allowed: Tensor | None) -> None:
        params: list[Tensor] = group["params"]
        if not params:
            return
        grads = [parameter.grad for parameter in params if parameter.grad is not None]
        if len(grads) != len(params):
            raise ValueError(
                f"{len(params) - len(grads)} of {len(params)} parameters have no gradient; "
                "leave parameters that are not trained out of the optimizer"
            )
        group["step"] += 1
        self._update_parts(group, params, grads, allowed)

    def _update_parts(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], allowed: Tensor | None
    ) -> None:
        means = [self.state[parameter]["exp_avg"] for parameter in params]
        squares = [self.state[parameter]["exp_avg_sq"] for parameter in params]
        whole = [[self.local_part(tensor) for tensor in tensors] for tensors in (params, grads, means, squares)]
        if self.kernel is None:
            for weights, gradients, block_means, block_squares in blocks(whole):
                adam_step(weights, gradients, block_means, block_squares, group)
            return
        if allowed is None:
            allowed = torch.ones((), dtype=torch.bool, device=whole[0][0].device)
        numbers = [allowed, *step_numbers(group)]
        for tensors in zip(*whole, strict=True):
            # .data: the compiler would also look at the tensor behind a view, and compile for 1 and 2 dimensions.
            self.kernel(*(tensor.view(-1).data for tensor in tensors), *numbers)


def adam_step(
    params: list[Tensor], grads: list[Tensor], means: list[Tensor], squares: list[Tensor], group: dict[str, Any]
) -> None:
    """The update number group["step"] (from 1) of plain tensors; writes into all but the gradients."""
    lr, (beta1, beta2), step = group["lr"], group["betas"], group["step"]
    if group["weight_decay"]:
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
    torch._foreach_lerp_(means, grads, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)

    denominators = torch._foreach_sqrt(squares)
    torch._foreach_div_(denominators, math.sqrt(1 - beta2**step))
    torch._foreach_add_(denominators, group["eps"])
    torch._foreach_addcdiv_(params, means, denominators, value=-lr / (1 - beta1**step))


def adam_kernel(  # noqa: PLR0917  # the compiled kernel's own list
    param: Tensor, grad: Tensor, mean: Tensor, square: Tensor, allowed: Tensor,
    kept: Tensor, mean_rest: Tensor, beta2: Tensor, square_rest: Tensor, root: Tensor, eps: Tensor, size: Tensor,
) -> None:  # fmt: skip
    """adam_step of one flat tensor where ``allowed``, for a compiler to make one loop of; numbers: step_numbers'."""
    new_mean = mean + (grad - mean) * mean_rest
    new_square = square * beta2 + grad * grad * square_rest
    new_param = param * kept - new_mean / (new_square.sqrt() / root + eps) * size
    param.copy_(torch.where(allowed, new_param, param))
    mean.copy_(torch.where(allowed, new_mean, mean))
    square.copy_(torch.where(allowed, new_square, square))


def step_numbers(group: dict[str, Any]) -> list[Tensor]:
    """What adam_kernel needs to know of a group, as tensors on the CPU: plain numbers would be compiled into it."""
    lr, (beta1, beta2), step = group["lr"], group["betas"], group["step"]
    root, size = math.sqrt(1 - beta2**step), lr / (1 - beta1**step)
    numbers = (1 - lr * group["weight_decay"], 1 - beta1, beta2, 1 - beta2, root, group["eps"], size)
    return [torch.tensor(number, dtype=torch.float64) for number in numbers]


def blocks(whole: list[list[Tensor]]) -> Iterator[list[list[Tensor]]]:
    """The same lists of tensors in parts, for element-wise work: whole on a GPU, where one launch serves a list.

    Args:
        whole: lists of equal length; tensors at the same place have the same shape.
    """
    if whole[0][0].device.type != "cpu":
        yield whole
        return
    for tensors in zip(*whole, strict=True):
        if all(tensor.is_contiguous() for tensor in tensors):
            pieces = (tensor.view(-1).split(BLOCK_ELEMENTS) for tensor in tensors)
            yield from ([[piece] for piece in block] for block in zip(*pieces, strict=True))
        else:
            yield [[tensor] for tensor in tensors]


def _check_group(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not (math.isfinite(group[name]) and group[name] >= 0):
            raise ValueError(f"{name} is {group[name]}; it must be finite and not negative")
    for beta in group["betas"]:
        if not 0 <= beta < 1:
            raise ValueError(f"betas are {group['betas']}; each must lie in [0, 1)")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for AdamW: matrices (embeddings among them), which decay, and vectors (norm weights), which do not.

    Frozen parameters are left out; order within a group is that of model.named_parameters(). A model without any
    vector or any matrix gets one group.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim >= 2]
    vectors = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def warmup_cosine(step: int, *, max_lr: float, min_lr: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of a step: a straight line up, then half a cosine down (arXiv 1608.03983, without restarts).

    Steps count from 0. Step 0 gets max_lr / warmup_steps (never zero: it would be a step for nothing), step
    warmup_steps - 1 gets max_lr, step total_steps - 1 and all later ones get min_lr. Without warmup step 0 gets max_lr.
    Where warmup fills all steps, the last one gets max_lr.

    Raises:
        ValueError: step negative, total_steps not positive, warmup_steps outside [0, total_steps].
    """
    if step < 0 or total_steps <= 0 or not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"step {step}, warmup_steps {warmup_steps}, total_steps {total_steps}; "
            "needed: step >= 0 and 0 <= warmup_steps <= total_steps, total_steps positive"
        )
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    peak, last = max(warmup_steps - 1, 0), total_steps - 1
    if step == peak:
        return max_lr
    progress = (step - peak) / (last - peak) if step < last else 1.0
    return min_lr + (max_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_linear(
    step: int, *, max_lr: float, min_lr: float, warmup_steps: int, decay_from: int, total_steps: int
) -> float:
    """Learning rate of a step: a straight line up, a plateau, a straight line down (arXiv 2404.06395).

    Steps count from 0, and the way up is that of warmup_cosine. The steps from there to decay_from - 1 get max_lr. Step
    decay_from is the first one below it, step total_steps - 1 and all later ones get min_lr, and the steps between them
    lie on a line. With decay_from equal to total_steps the last step gets max_lr too: there is no decay.

    Raises:
        ValueError: step negative, total_steps not positive, or not 0 <= warmup_steps <= decay_from <= total_steps.
    """
    if step < 0 or total_steps <= 0 or not 0 <= warmup_steps <= decay_from <= total_steps:
        raise ValueError(
            f"step {step}, warmup_steps {warmup_steps}, decay_from {decay_from}, total_steps {total_steps}; "
            "needed: step >= 0 and 0 <= warmup_steps <= decay_from <= total_steps, total_steps positive"
        )
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    if step < decay_from:
        return max_lr
    if step >= total_steps - 1:
        return min_lr
    return min_lr + (max_lr - min_lr) * (total_steps - 1 - step) / (total_steps - decay_from)


def clip_grad_norm(grads: Iterable[Tensor], max_norm: float) -> Tensor:
    """Clips the gradients of a single process in place by their global norm; returns the norm before, 0-d float32.

    Where several processes hold parts of the gradients, local_squared_norm is summed over them, and clip_by_norm
    clips the parts.
    """
    whole = list(grads)
    norm = local_squared_norm(whole).sqrt()
    clip_by_norm(whole, norm, max_norm)
    return norm


@torch.no_grad()
def local_squared_norm(grads: Iterable[Tensor]) -> Tensor:
    """The sum of squares over this process's part of the gradients, 0-d float32. Nothing waits for the device.

    Args:
        grads: plain tensors; empty ones are allowed.

    Raises:
        ValueError: there are no gradients.
    """
    local = list(grads)
    if not local:
        raise ValueError("0 gradients; needed: at least one gradient")
    return torch.stack(torch._foreach_norm(local, 2.0, dtype=torch.float32)).square().sum()


@torch.no_grad()
def clip_by_norm(grads: Iterable[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scales the gradients in place, such that their global Euclidean norm, now ``norm``, is at most max_norm.

    Nothing waits for the device. A norm that is not finite makes every gradient NaN, which the caller has to check.

    Args:
        grads: this process's part of the gradients.
        norm: global norm over all processes, 0-d float32.
        max_norm: positive; infinity changes nothing.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm {max_norm}; needed: a positive max_norm")
    # 1e-6 keeps a zero norm from dividing by zero, as torch.nn.utils.clip_grad_norm_ does.
    torch._foreach_mul_(list(grads), (max_norm / (norm + 1e-6)).clamp(max=1.0))
