"""Muon: the momentum of a hidden matrix, made orthogonal, is its step; embeddings, output and vectors keep AdamW.

Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024), with the scale and the weight decay of
"Muon is Scalable for LLM Training" (arXiv 2502.16982), so that AdamW's learning rate and decay fit both kinds.

Where processes hold parts of the matrices, each matrix is made orthogonal by one of them alone, its owner: the parts of
the momentum are sent there, the parts of the step are sent back.

Shapes: R rows, C columns of a matrix (a Linear's out, in).
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.optimizer import AdamW, parameter_groups

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the Newton-Schulz polynomial a x + b x^3 + c x^5: steep at zero, and within (0.7, 1.2) for x in (0.02, 1).

(2, -1.5, 0.5) converges to 1 instead, but doubles small values only: 12 iterations where these take 5."""
NUM_ITERATIONS = 5
MATCHED_RMS = 0.2
"""Root mean square of AdamW's steps as measured in arXiv 2502.16982; Muon's are scaled to it."""


Method = Callable[[Tensor], Tensor]
"""From matrices (..., R, C) to their orthogonal ones."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """The processes that hold row blocks of every matrix, block r of torch.chunk(matrix, size) on process r."""

    rank: int = 0
    size: int = 1
    all_to_all: Callable[[list[Tensor], list[int]], list[Tensor]] | None = None
    """Sends flat tensor r to process r, and returns what each process sent here; the second argument is how many
    numbers come from each. Collective."""


class Muon(AdamW):
    """AdamW, but groups with "muon": True (two-dimensional parameters only) make Muon's steps.

    State of a Muon parameter: "momentum_buffer", made by zeros_like. For the same gradients a step has the same bits
    whatever the number of processes is, save for the rounding of products batched differently.

    Args:
        params: groups as for AdamW; those of Muon have "muon": True.
        momentum: decay of the mean gradient, with Nesterov's look ahead.
        coefficients: a, b, c of the polynomial that makes the momentum orthogonal.
        iterations: how often it is applied.
        group: of processes; not given: this one alone holds everything.
        others: AdamW's arguments.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.95,
        coefficients: tuple[float, float, float] = COEFFICIENTS,
        iterations: int = NUM_ITERATIONS,
        group: Group | None = None,
        **others: Any,
    ) -> None:
        self.group, self.momentum = group or Group(), momentum
        self.orthogonalize = functools.partial(orthogonalize, coefficients=coefficients, iterations=iterations)
        super().__init__(params, lr, **others)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}; it must lie in [0, 1)")
        shapes = {tuple(p.shape) for each in self.param_groups if each.get("muon") for p in each["params"]}
        if any(len(shape) != 2 for shape in shapes):
            raise ValueError(f"a Muon group holds the shapes {sorted(shapes)}; Muon is for matrices only")

    def init_state(self) -> None:
        """Makes zero moments for parameters that have none yet."""
        for group in self.param_groups:
            if group.get("muon"):
                for parameter in group["params"]:
                    if not self.state[parameter]:
                        self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        super().init_state()

    def _update_parts(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], allowed: Tensor | None
    ) -> None:
        if not group.get("muon"):
            super()._update_parts(group, params, grads, allowed)
            return
        buffers = [self.local_part(self.state[parameter]["momentum_buffer"]) for parameter in params]
        local = [self.local_part(parameter) for parameter in params]
        local_grads = [self.local_part(grad) for grad in grads]
        if allowed is not None:  # a mean of itself with itself stays, and what follows is finite
            local_grads = [torch.where(allowed, *pair) for pair in zip(local_grads, buffers, strict=True)]
        torch._foreach_lerp_(buffers, local_grads, 1 - self.momentum)
        ahead = torch._foreach_lerp(local_grads, buffers, self.momentum)  # Nesterov
        steps = orthogonal_parts(
            list(ahead), [(p.shape[0], p.shape[1]) for p in params], self.group, self.orthogonalize
        )
        before = local if allowed is None else [part.clone() for part in local]
        if group["weight_decay"]:
            torch._foreach_mul_(local, 1 - group["lr"] * group["weight_decay"])
        for part, step, parameter in zip(local, steps, params, strict=True):
            part.add_(step, alpha=-group["lr"] * MATCHED_RMS * math.sqrt(max(parameter.shape)))
        if allowed is not None:
            for part, old in zip(local, before, strict=True):
                part.copy_(torch.where(allowed, part, old))


def muon_groups(model: nn.Module, hidden: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for Muon: the matrices inside ``hidden`` first, then parameter_groups of the rest of the model."""
    matrices = [p for p in hidden.parameters() if p.requires_grad and p.ndim == 2]
    chosen = {id(parameter) for parameter in matrices}
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": weight_decay, "muon": True}]
    for group in parameter_groups(model, weight_decay):
        rest = [parameter for parameter in group["params"] if id(parameter) not in chosen]
        if rest:
            groups.append({**group, "params": rest})
    return groups


def orthogonal_parts(
    parts: list[Tensor], shapes: list[tuple[int, int]], group: Group, method: Method | None = None
) -> list[Tensor]:
    """This process's rows of orthogonalize(matrix), for matrices of which every process holds its rows.

    Args:
        parts: (R_own, C) each, this process's rows; some may be empty.
        shapes: (R, C) of the whole matrices.
        method: in place of orthogonalize.
    """
    method = method or orthogonalize
    if group.size == 1 or group.all_to_all is None:
        return orthogonalize_all(parts, method)
    owners = assign_owners(shapes, group.size)
    rows = [[len(block) for block in _row_blocks(shape[0], group.size)] for shape in shapes]
    owned = [[index for index, owner in enumerate(owners) if owner == rank] for rank in range(group.size)]
    mine = owned[group.rank]

    outgoing = [_pack([parts[index] for index in indices], parts[0]) for indices in owned]
    counts = [sum(rows[index][rank] * shapes[index][1] for index in mine) for rank in range(group.size)]
    incoming = group.all_to_all(outgoing, counts)
    blocks = [_unpack(flat, [(rows[i][rank], shapes[i][1]) for i in mine]) for rank, flat in enumerate(incoming)]
    whole = orthogonalize_all([torch.cat(pieces) for pieces in zip(*blocks, strict=True)], method)

    split = [matrix.split(rows[index]) for matrix, index in zip(whole, mine, strict=True)]
    outgoing = [_pack([pieces[rank] for pieces in split], parts[0]) for rank in range(group.size)]
    counts = [sum(parts[index].numel() for index in indices) for indices in owned]
    incoming = group.all_to_all(outgoing, counts)
    results: dict[int, Tensor] = {}
    for indices, flat in zip(owned, incoming, strict=True):
        results |= dict(zip(indices, _unpack(flat, [tuple(parts[i].shape) for i in indices]), strict=True))
    return [results[index] for index in range(len(parts))]


def assign_owners(shapes: list[tuple[int, int]], num_processes: int) -> list[int]:
    """A process for each matrix, the costliest matrices first, each to the one with the least to do so far."""
    owners, load = [0] * len(shapes), [0] * num_processes
    for index in sorted(range(len(shapes)), key=lambda i: -min(shapes[i]) * math.prod(shapes[i])):
        owners[index] = load.index(min(load))
        load[owners[index]] += min(shapes[index]) * math.prod(shapes[index])
    return owners


def orthogonalize_all(matrices: list[Tensor], method: Method) -> list[Tensor]:
    """``method`` of each, those of equal shape together."""
    by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        by_shape[tuple(matrix.shape)].append(index)
    results: dict[int, Tensor] = {}
    for indices in by_shape.values():
        stacked = method(torch.stack([matrices[index] for index in indices]))
        results |= dict(zip(indices, stacked.unbind(), strict=True))
    return [results[index] for index in range(len(matrices))]


def orthogonalize(
    matrices: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    *,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    iterations: int = NUM_ITERATIONS,
) -> Tensor:
    """U V^T, about, of U S V^T: all singular values become 0.7 to 1.2. (..., R, C) -> the same shape, in dtype.

    Iterations of a quintic polynomial in the matrix (Newton-Schulz). bfloat16 will do: the singular values need
    not be exact. Those far below the largest, 1/1000 and less, stay smaller.
    """
    a, b, c = coefficients
    x = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    norm = matrices.square().sum(dim=(-2, -1), keepdim=True).sqrt()  # at least the largest singular value
    x = x / (norm + 1e-7).to(dtype)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def _row_blocks(num_rows: int, num_processes: int) -> list[range]:
    """The rows of each process as torch.chunk divides them, empty ones for processes that get none."""
    size = math.ceil(num_rows / num_processes)
    return [range(min(r * size, num_rows), min((r + 1) * size, num_rows)) for r in range(num_processes)]


def _pack(tensors: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat([tensor.reshape(-1).to(like.dtype) for tensor in tensors]) if tensors else like.new_empty(0)


def _unpack(flat: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    pieces = flat.split([math.prod(shape) for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
