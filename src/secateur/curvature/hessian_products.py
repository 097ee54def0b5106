"""Products with the matrix of second derivatives of the mean loss, without the matrix.

With ``L(theta)`` the mean loss over fixed batches, in eval mode::

    hessian         H v = d/d theta (dL/d theta . v)                      (Pearlmutter 1994)
    gauss_newton    H v = J^T (d^2 L / d outputs^2) (J v)                 (Schraudolph 2002), never negative
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateur._internal.distributed import world_size
from secateur._internal.errors import SecateurError, unknown
from secateur.curvature.losses import Loss, loss_of
from secateur.curvature.passes import at_rest, checked, examples_of, forward, split_batch

MATRICES = ("hessian", "gauss_newton")
Vector = Mapping[str, Tensor]
"""One tensor for each trained parameter, by its name."""


class Products:
    """``H @ v`` for blocks of vectors.

    The batches are kept, so that every product is with the same matrix. Where ``torch.distributed`` runs, each process
    gives its part of the data and all get the product with the whole.

    Args:
        model: any module; parameters that do not want a gradient are taken as given.
        data: batches (inputs, targets).
        loss: ``"cross_entropy"``, ``"mse"`` (half the squared error) or a callable of outputs and targets.
        matrix: ``"hessian"`` or ``"gauss_newton"``.
        batches: use at most so many.

    Attributes:
        shapes: the trained parameters, by name; a vector is their concatenation in this order.
        size: the length of a vector.
        examples: how many examples the mean is over.

    Raises:
        SecateurError: an unknown matrix or loss, no data, no parameter that wants a gradient.
    """

    def __init__(
        self, model: nn.Module, data: Iterable[Any], loss: str | Loss, *, matrix: str = "hessian",
        batches: int | None = None,
    ) -> None:  # fmt: skip
        if matrix not in MATRICES:
            raise unknown("matrix", matrix, MATRICES)
        self.model, self.loss, self.matrix = model, loss_of(loss), matrix
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise SecateurError(f"no parameter of this {type(model).__name__} wants a gradient: nothing can be curved")
        self.shapes = {name: p.shape for name, p in self.parameters.items()}
        self.size = sum(p.numel() for p in self.parameters.values())
        self.device = next(iter(self.parameters.values())).device
        self._batches = [
            split_batch(batch, "empirical", number, self.device) for number, batch in enumerate(islice(data, batches))
        ]
        if not self._batches:
            raise SecateurError("data: the loader is empty; give at least one batch")
        self.examples = self._sum(torch.tensor(sum(examples_of(x) for x, _ in self._batches), device=self.device))

    def __call__(self, vectors: Float[Tensor, "m size"]) -> Float[Tensor, "m size"]:
        """The products with each of ``m`` vectors, in the parameters' precision (float32 at least).

        Raises:
            SecateurError: a batch that does not fit, a loss that is not finite or cannot be differentiated twice.
        """
        total = torch.zeros_like(vectors)
        one = self._hessian if self.matrix == "hessian" else self._gauss_newton
        with at_rest(self.model, gradients=True), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for number, (inputs, targets) in enumerate(self._batches):
                total += one(inputs, targets, vectors, number)
        return torch.as_tensor(self._sum(total)) / self.examples

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector [size] as one tensor a parameter (views)."""
        parts = vector.split([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def join(self, vector: Vector) -> Tensor:
        """The inverse of :meth:`split`; what is missing is zero."""
        p = next(iter(self.parameters.values()))
        return torch.cat([
            vector[name].flatten().to(p) if name in vector else p.new_zeros(shape.numel())
            for name, shape in self.shapes.items()
        ])  # fmt: skip

    def _sum(self, own: Tensor) -> Tensor:
        if world_size() > 1:
            dist.all_reduce(own)
        return own

    def _loss(self, outputs: Any, targets: Any, number: int) -> Tensor:
        return next(checked(iter([self.loss(outputs, targets, torch.Generator(self.device))]), number))

    def _hessian(self, inputs: Any, targets: Any, vectors: Tensor, number: int) -> Tensor:
        parameters = list(self.parameters.values())
        value = self._loss(forward(self.model, inputs, number), targets, number)
        with _twice(number):
            slope = _joined(_slope(value, parameters), parameters)
            return self._pull(slope, vectors)

    def _gauss_newton(self, inputs: Any, targets: Any, vectors: Tensor, number: int) -> Tensor:
        parameters = list(self.parameters.values())
        outputs = forward(self.model, inputs, number)
        if not isinstance(outputs, Tensor):
            raise SecateurError(
                f"matrix='gauss_newton' needs a model whose output is one tensor, this one gives a "
                f"{type(outputs).__name__}: use matrix='hessian'"
            )
        with _twice(number):
            dual = torch.zeros_like(outputs, requires_grad=True)  # J^T dual is linear in dual, with derivative J^T
            pulled = _joined(
                torch.autograd.grad(outputs, parameters, dual, create_graph=True, allow_unused=True), parameters
            )
            moved = _grads(pulled, [dual], vectors)[0]
            leaf = outputs.detach().requires_grad_()
            bent = _grads(_slope(self._loss(leaf, targets, number), [leaf])[0], [leaf], moved)[0]
            return self._pull(outputs, bent)

    def _pull(self, of: Tensor, weights: Tensor) -> Tensor:
        parameters = list(self.parameters.values())
        found = _grads(of, parameters, weights)
        return torch.cat([g.flatten(1) for g in found], 1)


def _slope(value: Tensor, by: list[Any]) -> tuple[Any, ...]:
    """The gradient of the loss, to be differentiated again.

    It is scaled by a 1 that wants a gradient, for functions that can be differentiated once only to leave their mark:
    beside a constant they would count as if they had no curvature.

    Raises:
        RuntimeError: there is such a function.
    """
    one = torch.ones_like(value, requires_grad=True)
    slope = torch.autograd.grad(value, by, one, create_graph=True, allow_unused=True)
    seen: set[Any] = set()
    ahead = [s.grad_fn for s in slope if s is not None]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            if node.name().endswith("Error"):  # what once_differentiable leaves; nothing on the way to the parameters
                raise RuntimeError("a function on the way is marked as once_differentiable")
            seen.add(node)
            ahead += [following for following, _ in node.next_functions]
    return slope


def _grads(of: Tensor, by: list[Any], weights: Tensor) -> list[Tensor]:
    """The gradients of ``of . weights[i]`` for every i, [m, *shape] each."""
    many = len(weights) > 1
    found = torch.autograd.grad(
        of, by, weights.to(of) if many else weights[0].to(of), retain_graph=True, allow_unused=True,
        is_grads_batched=many,
    )  # fmt: skip
    return [
        t.new_zeros(len(weights), *t.shape) if g is None else (g if many else g[None])
        for g, t in zip(found, by, strict=True)
    ]


def _joined(gradients: tuple[Tensor | None, ...], parameters: list[nn.Parameter]) -> Tensor:
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


@contextmanager
def _twice(number: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise SecateurError(
            f"the loss of batch {number} cannot be differentiated twice: {error}; the Kronecker-factored basis "
            "(basis='kfe') needs first derivatives alone"
        ) from error
