"""A step of several processes: the loss is the mean over the ranks, a norm the sum over the shards.

Two ways to share a model, each with one collective of a few numbers per step, and no read by the
host:

* replicas (DistributedDataParallel): gradients are averaged before the step, so norms are right on
  every rank, but a loss is that of the rank's own batch. ``optimizer.data_parallel()`` says so.
* shards (``fully_shard``, tensor parallel): the parameters are DTensors and say it themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available():
    from torch.distributed.tensor import DTensor, Partial, Replicate
else:  # a build of torch without it

    class DTensor:  # type: ignore[no-redef]
        """No tensor is one."""


def sharded(t: Tensor) -> bool:
    return isinstance(t, DTensor)


def local(t: Tensor) -> Tensor:
    """This rank's shard, sharing its memory; any other tensor itself."""
    return t.to_local() if isinstance(t, DTensor) else t


def local_gradient(p: Tensor) -> Tensor:
    """This rank's shard of the gradient, cut as the parameter is."""
    g = p.grad
    assert g is not None  # only parameters with a gradient are stepped
    if isinstance(p, DTensor) and (not isinstance(g, DTensor) or g.placements != p.placements):
        raise RuntimeError(
            f"the gradient of a parameter of shape {tuple(p.shape)} lies as "
            f"{getattr(g, 'placements', 'no DTensor')}, the parameter as {p.placements}, so their "
            "shards cannot be matched. Call p.grad = p.grad.redistribute(placements=p.placements)."
        )
    return local(g)


def placement(p: Tensor) -> Any:
    """The mesh and how the parameter lies on it; None for a parameter that is no DTensor."""
    if not isinstance(p, DTensor):
        return None
    if any(isinstance(kind, Partial) for kind in p.placements):
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} lies as {p.placements}: its ranks hold terms "
            "of a sum, which have no norm of their own. Use Shard or Replicate."
        )
    return p.device_mesh, p.placements


class Ranks:
    """The ranks that take a step together.

    Args:
        placements: of the parameters, see :func:`placement`.
        parallel: the parameters that are no DTensors are replicas, see the module.
    """

    def __init__(self, placements: Iterable[Any], parallel: bool) -> None:
        meshes = {id(found[0]): found[0] for found in placements if found is not None}
        if len(meshes) > 1:
            raise ValueError(
                f"the parameters lie on {len(meshes)} device meshes, but their step size is one "
                "number. Shard all of them over one mesh, or make an optimizer for each."
            )
        self.groups: list[Any] = []
        self.size = 1
        for mesh in meshes.values():
            self.groups = [mesh.get_group(i) for i in range(mesh.ndim)]
            self.size = mesh.size()
        if parallel and not meshes and dist.is_available() and dist.is_initialized():
            self.groups, self.size = [None], dist.get_world_size()
        self.sharded = bool(meshes)

    def share(self, found: Any) -> float:
        """1 / how many ranks hold the same numbers of a parameter: each counts once in a sum."""
        if not self.sharded:
            return 1.0
        if found is None:
            return 1.0 / self.size
        copies = 1
        for i, kind in enumerate(found[1]):
            copies *= found[0].size(i) if isinstance(kind, Replicate) else 1
        return 1.0 / copies

    def reduce(self, loss: Tensor, sums: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The mean of ``loss`` over the ranks, and ``sums`` over all shards."""
        if self.size == 1:
            return loss, sums
        numbers = torch.stack([loss / self.size, *(sums if self.sharded else [])])
        for group in self.groups:
            dist.all_reduce(numbers, group=group)
        return numbers[0], list(numbers[1:].unbind()) if self.sharded else sums
