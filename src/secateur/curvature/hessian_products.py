"""Products with the matrix of second derivatives of the mean loss, without the matrix.

With ``L(theta)`` the mean loss over fixed batches, in eval mode::

    hessian         H v = d/d theta (dL/d theta . v)                      (Pearlmutter 1994)
    gauss_newton    H v = J^T (d^2 L / d outputs^2) (J v)                 (Schraudolph 2002), never negative
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateur._internal.batches import Batch, call_model
from secateur._internal.checks import check_choice
from secateur._internal.distributed import all_reduce_
from secateur._internal.errors import SecateurError
from secateur._internal.losses import checked_loss, logits_of, needs_gradient, outputs_of
from secateur._internal.state import check_differentiable, fork_rng_of, preserved
from secateur._internal.workload import Workload

MATRICES = ("hessian", "gauss_newton")
Vector = Mapping[str, Tensor]
"""One tensor for each trained parameter, by its name."""


class Products:
    """``H @ v`` for blocks of vectors.

    The batches are kept, so that every product is with the same matrix. Every process gives its shard of the data, and
    all get the product with the whole.

    Args:
        work: the model (parameters that do not want a gradient are taken as given), the data and the loss.
        matrix: ``"hessian"`` or ``"gauss_newton"``.
        batches: use at most so many.

    Attributes:
        shapes: the trained parameters, by name; a vector is their concatenation in this order.
        size: the length of a vector.
        examples: how many examples the mean is over.

    Raises:
        SecateurError: an unknown matrix or loss, no data, no parameter that wants a gradient.
    """

    def __init__(self, work: Workload, *, matrix: str = "hessian", batches: int | None = None) -> None:
        check_choice("matrix", matrix, MATRICES)
        self.work, self.model, self.matrix = work, work.model, matrix
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise SecateurError(
                f"no parameter of this {type(self.model).__name__} wants a gradient: nothing can be curved"
            )
        self.shapes = {name: p.shape for name, p in self.parameters.items()}
        self.size = sum(p.numel() for p in self.parameters.values())
        self.device = next(iter(self.parameters.values())).device
        check_differentiable(self.model)
        with (
            torch.inference_mode(False),
            fork_rng_of(self.model.parameters()),
        ):  # a loader may draw the order of its batches
            self._batches = work.together(lambda: list(work.batches(batches)))
        self.examples = self._sum(torch.tensor(sum(batch.examples for batch in self._batches), device=self.device))

    def __call__(self, vectors: Float[Tensor, "m size"]) -> Float[Tensor, "m size"]:
        """The products with each of ``m`` vectors, in the parameters' precision (float32 at least).

        Raises:
            SecateurError: a batch that does not fit, a loss that is not finite or cannot be differentiated twice.
        """
        one = self._hessian if self.matrix == "hessian" else self._gauss_newton
        with preserved(self.model), torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            vectors = vectors.clone()
            total = self.work.together(lambda: self._own(one, vectors))
        return torch.as_tensor(self._sum(total)) / self.examples

    def _own(self, one: Callable[[Batch, Tensor], Tensor], vectors: Tensor) -> Tensor:
        """The sum over this process's batches."""
        total = torch.zeros_like(vectors)
        for batch in self._batches:
            self.work.forwards += 1
            total += one(batch, vectors)
        return total

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
        return all_reduce_(own, self.work.group)

    def _outputs(self, batch: Batch) -> Any:
        return outputs_of(lambda inputs: call_model(self.model, inputs), batch, self.work.loss)

    def _loss(self, outputs: Any, batch: Batch) -> Tensor:
        loss = self.work.loss
        return needs_gradient(checked_loss(lambda: loss.total(outputs, batch.targets, batch.examples), batch.number))

    def _hessian(self, batch: Batch, vectors: Tensor) -> Tensor:
        parameters = list(self.parameters.values())
        value = self._loss(self._outputs(batch), batch)
        with _twice(batch.number):
            slope = _joined(_slope(value, parameters), parameters)
            return self._pull(slope, vectors)

    def _gauss_newton(self, batch: Batch, vectors: Tensor) -> Tensor:
        parameters = list(self.parameters.values())
        if self.work.loss.of_model:
            raise SecateurError(
                "matrix='gauss_newton' needs a loss of the outputs, and loss='model' is computed inside of the model: "
                "use matrix='hessian', or loss='cross_entropy'"
            )
        outputs = logits_of(self._outputs(batch))
        with _twice(batch.number):
            dual = torch.zeros_like(outputs, requires_grad=True)  # J^T dual is linear in dual, with derivative J^T
            pulled = _joined(
                torch.autograd.grad(outputs, parameters, dual, create_graph=True, allow_unused=True), parameters
            )
            moved = _grads(pulled, [dual], vectors)[0]
            leaf = outputs.detach().requires_grad_()
            bent = _grads(_slope(self._loss(leaf, batch), [leaf])[0], [leaf], moved)[0]
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
