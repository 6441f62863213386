"""A variable, tree or Module, as one flat vector.

The mathematics of this package runs on flat vectors: every product, norm and update is one kernel,
and a checkpoint or a collective is one buffer. Only the losses see the user's own structure.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bilevel.require import shown, told

Place = tuple[dict[str, Any], str, Any]  # what a Module holds, a name in it, and what it is
Variable = Any  # a tensor, a nest of dict / list / tuple of tensors, or an nn.Module


def leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The leaves of a tree in order, each with its path, such as ``x['w'][0]``."""
    if isinstance(tree, dict):
        for key, child in tree.items():
            yield from leaves(child, f"{path}[{key!r}]")
    elif isinstance(tree, list | tuple):
        for i, child in enumerate(tree):
            yield from leaves(child, f"{path}[{i}]")
    else:
        yield path, tree


def rebuild(tree: Any, new: Iterator[Any]) -> Any:
    """A tree of the same structure whose leaves are taken from ``new`` in order."""
    if isinstance(tree, dict):
        found = {key: rebuild(child, new) for key, child in tree.items()}
        if type(tree) is dict:
            return found
        out = copy.copy(tree)  # keeps the kind of dict
        out.update(found)
        return out
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):  # a NamedTuple
        return type(tree)(*(rebuild(child, new) for child in tree))
    if isinstance(tree, list | tuple):
        return type(tree)([rebuild(child, new) for child in tree])
    return next(new)


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """The tree with ``function`` applied to every leaf."""
    return rebuild(tree, iter([function(leaf) for _, leaf in leaves(tree, "")]))


class Layout:
    """How one variable lies in a flat vector, and back.

    Args:
        value: a tree of floating tensors on one device, or a Module. Of a Module the parameters
            that require a gradient are the variable; frozen ones and buffers stay as they are.
            Leaves of several floating types share a vector of the widest and are cast back.
        name: 'x' or 'y', for messages.

    Raises:
        TypeError: a leaf is no tensor, or not of a floating type.
        ValueError: nothing to optimise, leaves on several devices, or layers of a Module that do
            not fit.
    """

    def __init__(self, value: Variable, name: str) -> None:
        self.name = name
        self.module = value if isinstance(value, nn.Module) else None
        if self.module is not None:
            lazy = [k for k, p in self.module.named_parameters() if is_lazy(p)]
            if lazy:
                raise ValueError(
                    f"{name} is a Module ({type(value).__name__}) whose parameters "
                    f"{', '.join(lazy)} have no shape yet; call it once on a batch before."
                )
            _refuse_embeddings(self.module, name)
            self.tree: Any = {k: p for k, p in self.module.named_parameters() if p.requires_grad}
            order = {id(p): i for i, p in enumerate(self.tree.values())}
            # a layer may have several names, and a parameter several places
            self._places: list[tuple[dict[str, Any], str, int]] = [
                (owner._parameters, key, order[id(parameter)])
                for owner in self.module.modules()
                for key, parameter in owner._parameters.items()
                if id(parameter) in order
            ]
            if not self.tree:
                raise ValueError(
                    f"{name} is a Module ({type(value).__name__}) with no parameter that requires "
                    f"a gradient, so there is nothing to optimise; call requires_grad_(True) on "
                    f"the parameters to be learned."
                )
        else:
            self.tree = value
        found = list(leaves(self.tree, name))
        for path, leaf in found:
            _refuse_unfit(path, leaf)
        self.paths = [path for path, _ in found]
        self.shapes = [leaf.shape for _, leaf in found]
        self.dtypes = [leaf.dtype for _, leaf in found]
        self.sizes = [leaf.numel() for _, leaf in found]
        if sum(self.sizes) == 0:
            raise ValueError(
                f"{name} = {shown(value)} holds no numbers, so there is nothing to optimise; "
                f"pass a tensor, a dict / list / tuple of tensors, or a Module."
            )
        devices = {leaf.device for _, leaf in found}
        if len(devices) > 1:
            listed = ", ".join(f"{path} on {leaf.device}" for path, leaf in found)
            raise ValueError(
                f"{name} lies on several devices ({listed}), but is handled as one vector; "
                f"move it to one device with .to(device)."
            )
        self.device = devices.pop()
        self.dtype = self.dtypes[0]
        for dtype in self.dtypes[1:]:
            self.dtype = torch.promote_types(self.dtype, dtype)
        # only the structure is kept: the tensors belong to the caller
        self.tree = rebuild(self.tree, iter([None] * len(found)))

    @property
    def size(self) -> int:
        return sum(self.sizes)

    def flatten(self, value: Variable) -> Tensor:
        """A new vector holding ``value``, which must have this layout's structure and shapes."""
        if isinstance(value, nn.Module):
            value = {k: p for k, p in value.named_parameters() if p.requires_grad}
        found = list(leaves(value, self.name))
        for path, leaf in found:
            _refuse_unfit(f"a value for {path}", leaf)
        shapes = [leaf.shape for _, leaf in found]
        if [path for path, _ in found] != self.paths or shapes != self.shapes:
            want = ", ".join(f"{p}{tuple(s)}" for p, s in zip(self.paths, self.shapes, strict=True))
            got = ", ".join(f"{p}{tuple(v.shape)}" for p, v in found)
            raise told(
                ValueError,
                f"a value for {self.name} has the structure {got}, but {self.name} has {want}; "
                f"return tensors of the same structure and shapes.",
            )
        parts = [leaf.detach().to(self.device, self.dtype).reshape(-1) for _, leaf in found]
        return torch.cat(parts) if len(parts) > 1 else parts[0].clone()

    def parts(self, vector: Tensor) -> list[Tensor]:
        """The leaves as views of ``vector`` (casts where a leaf has a type of its own)."""
        pieces = [vector] if len(self.sizes) == 1 else vector.split(self.sizes)
        shaped = [  # a view that changes nothing is a node more for every derivative
            piece if piece.shape == shape else piece.view(shape)
            for piece, shape in zip(pieces, self.shapes, strict=True)
        ]
        if self.dtypes == [vector.dtype] * len(shaped):
            return shaped
        return [piece.to(dtype) for piece, dtype in zip(shaped, self.dtypes, strict=True)]

    def unflatten(self, vector: Tensor) -> Any:
        """The tree of views of ``vector``; for a Module, a dict of its parameters by name."""
        return rebuild(self.tree, iter(self.parts(vector)))

    def placed(self, vector: Tensor) -> list[Place]:
        """Where the Module keeps its parameters, and the parts of ``vector`` that belong there;
        nothing of a tree."""
        if self.module is None:
            return []
        parts = self.parts(vector)
        return [(held, key, parts[i]) for held, key, i in self._places]

    def export(self, vector: Tensor) -> Variable:
        """The value as the user gave it: new tensors, or the Module with this value written in."""
        if self.module is None:
            return tree_map(lambda leaf: leaf.detach().clone(), self.unflatten(vector))
        with torch.no_grad():
            parameters = dict(self.module.named_parameters())
            for name, part in self.unflatten(vector).items():
                parameters[name].copy_(part)
        return self.module


class Bound:
    """Modules with other tensors in place of their parameters, as long as it is entered, which may
    be done any number of times, one after the other."""

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = places
        self._own: list[Any] = []

    def __enter__(self) -> None:
        self._own = [held[key] for held, key, _ in self._places]
        for held, key, part in self._places:
            held[key] = part

    def __exit__(self, *error: object) -> None:
        for (held, key, _), own in zip(self._places, self._own, strict=True):
            held[key] = own


def _refuse_embeddings(module: nn.Module, name: str) -> None:
    """Refuse what has sparse gradients, or writes into its weights in a forward pass."""
    for path, layer in module.named_modules():
        if not isinstance(layer, nn.Embedding | nn.EmbeddingBag) or not layer.weight.requires_grad:
            continue
        for option, used in (("sparse=True", layer.sparse), ("max_norm", layer.max_norm)):
            if used:
                raise ValueError(
                    f"{name} is a Module ({type(module).__name__}) with "
                    f"{type(layer).__name__}(..., {option}) at {path or 'its top'}, but variables "
                    f"are handled as one dense vector that losses only read; leave "
                    f"{option.partition('=')[0]} out."
                )


def _refuse_unfit(path: str, leaf: Any) -> None:
    if isinstance(leaf, nn.Module):
        raise told(
            TypeError,
            f"{path} is a Module ({type(leaf).__name__}) inside a tree; pass one Module, such as "
            f"nn.ModuleDict with an nn.ParameterDict in it, or a tree of its parameters.",
        )
    if not isinstance(leaf, Tensor):
        raise told(
            TypeError,
            f"{path} is {shown(leaf)} ({type(leaf).__name__}), not a tensor; wrap numbers in "
            f"torch.tensor(...), or let the loss close over what is not to be optimised.",
        )
    if leaf.is_complex():
        raise told(
            TypeError,
            f"{path} has dtype {leaf.dtype}, but variables are handled as one real vector; pass "
            f"torch.view_as_real({path}), and let the loss begin with torch.view_as_complex.",
        )
    if not leaf.is_floating_point():
        raise told(
            TypeError,
            f"{path} has dtype {leaf.dtype}, which has no gradient; convert it with .float(), or "
            f"let the loss close over it if it is not to be optimised.",
        )
    if leaf.layout != torch.strided:
        raise told(
            TypeError,
            f"{path} is a sparse tensor ({leaf.layout}), but variables are handled as one dense "
            f"vector; convert it with .to_dense(), or optimise its values().",
        )
