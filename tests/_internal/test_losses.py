"""A batch becomes a loss: every kind that the table names by an exact comparison, and what is ambiguous is refused."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur._internal.batches import read_batch
from secateur._internal.errors import BadBatch, SecateurError
from secateur._internal.losses import LOSSES, batch_loss, class_axis, logits_of, needs_gradient, read_loss

CPU = torch.device("cpu")
G = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=G)


def classes(*shape, many=5):
    return torch.randint(many, shape, generator=G)


LOGITS, LABELS = draw(4, 5), classes(4)
SEQUENCE, TOKENS = draw(4, 7, 5), classes(4, 7)
MAP, PIXELS = draw(4, 5, 6, 3), classes(4, 6, 3)
SHARES = draw(4, 5).softmax(1)
FLAT = {  # outputs, targets, the logits and classes that are compared, one row a position
    "images": (LOGITS, LABELS, LOGITS, LABELS),
    "one image without a batch": (LOGITS[0], LABELS[0], LOGITS[:1], LABELS[:1]),
    "sequences": (SEQUENCE, TOKENS, SEQUENCE.reshape(28, 5), TOKENS.flatten()),
    "sequences of sequences": (
        SEQUENCE.view(2, 2, 7, 5), TOKENS.view(2, 2, 7), SEQUENCE.reshape(28, 5), TOKENS.flatten()),
    "maps": (MAP, PIXELS, MAP.permute(0, 2, 3, 1).reshape(72, 5), PIXELS.flatten()),
}  # fmt: skip


@pytest.mark.parametrize("ignored", [False, True], ids=["all", "some ignored"])
@pytest.mark.parametrize("name", FLAT)
def test_cross_entropy_compares_logits_with_classes_position_by_position(name, ignored):
    outputs, targets, rows, wanted = FLAT[name]
    if ignored and targets.ndim:
        targets = torch.where(torch.arange(targets.numel()).view(targets.shape) % 3 == 0, -100, targets)
        wanted = torch.where(torch.arange(len(wanted)) % 3 == 0, -100, wanted)
    loss, counted = LOSSES["cross_entropy"], wanted != -100
    each = -rows.log_softmax(1)[counted, wanted[counted]]
    torch.testing.assert_close(loss.mean(outputs, targets), each.mean())
    torch.testing.assert_close(loss.total(outputs, targets, 4), each.sum())


@pytest.mark.parametrize("name", FLAT)
def test_drawn_classes_have_the_models_distribution_in_the_shape_of_the_targets(name):
    outputs, targets, rows, _ = FLAT[name]
    loss, generator = LOSSES["cross_entropy"], torch.Generator().manual_seed(0)
    drawn = torch.stack([loss.draw(outputs, targets, generator) for _ in range(3000)])
    assert drawn.shape[1:] == targets.shape
    found = F.one_hot(drawn.reshape(3000, -1), 5).double().mean(0)
    torch.testing.assert_close(found, rows.softmax(1), rtol=0, atol=0.05)
    if targets.ndim:
        hidden = torch.where(targets == targets.flatten()[0], -100, targets)
        assert torch.equal(loss.draw(outputs, hidden, generator) == -100, hidden == -100)


def test_probabilities_are_compared_too():
    torch.testing.assert_close(LOSSES["cross_entropy"].mean(LOGITS, SHARES), F.cross_entropy(LOGITS, SHARES))


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        (draw(4, 5, 5), classes(4, 5), r"\[4, 5, 5\] and targets \[4, 5\] either dim 1 or the last one"),
        (draw(4, 7, 5), classes(4, 6), r"\[4, 7, 5\] and targets \[4, 6\] no dim can be"),
        (draw(4, 7, 5), None, "a tensor of targets is expected"),
        (draw(4, 5), classes(3), r"targets \[3\] do not fit outputs \[4, 5\]"),
        (draw(4, 7, 5), draw(4, 7, 5), "for others, a callable"),
        (draw(4, 5), draw(4), "give classes as whole numbers"),
    ],
)  # fmt: skip
def test_what_cross_entropy_cannot_tell_is_refused(outputs, targets, message):
    with pytest.raises(BadBatch, match=message):
        LOSSES["cross_entropy"].mean(outputs, targets)


def test_where_nothing_tells_which_dim_are_the_classes_none_can_be_drawn():
    assert class_axis(LOGITS, None) == 1
    with pytest.raises(BadBatch, match="the targets tell which dim the classes are"):
        LOSSES["cross_entropy"].draw(SEQUENCE, None, G)


def test_mse_is_of_one_shape():
    outputs, targets = draw(4, 3), draw(4, 3)
    torch.testing.assert_close(LOSSES["mse"].mean(outputs, targets), F.mse_loss(outputs, targets))
    total = LOSSES["mse"].total(outputs, targets, 4)
    torch.testing.assert_close(total, 0.5 * (outputs - targets).square().sum())
    for one, other in ((draw(4, 1), draw(4)), (draw(4), draw(4, 1)), (draw(4, 3), draw(3))):
        with pytest.raises(
            BadBatch, match=re.escape(f"outputs {list(one.shape)} and targets {list(other.shape)} must")
        ):
            LOSSES["mse"].mean(one, other)


def test_the_exact_fisher_leaves_out_what_does_not_count():
    targets = torch.tensor([0, -100, 2, 3])
    outputs = LOGITS.clone().requires_grad_()
    for value in LOSSES["cross_entropy"].each(outputs, targets):
        (slope,) = torch.autograd.grad(value, outputs, retain_graph=True)
        assert not slope[1].any()
        assert slope[0].any()


@dataclass
class Output:
    """As models of transformers give it."""

    logits: torch.Tensor
    loss: torch.Tensor | None = None


@pytest.mark.parametrize(
    "wrap",
    [lambda t: t, lambda t: (t, t + 1), lambda t: {"logits": t}, Output],
    ids=["tensor", "tuple", "dict", "object"],
)
def test_the_tensor_of_every_kind_of_output(wrap):
    assert logits_of(wrap(LOGITS)) is LOGITS
    for name, targets in (("cross_entropy", LABELS), ("mse", LOGITS + 1)):
        assert LOSSES[name].mean(wrap(LOGITS), targets) == LOSSES[name].mean(LOGITS, targets)
    assert read_loss(nn.BCEWithLogitsLoss()).mean(wrap(LOGITS), SHARES) == nn.BCEWithLogitsLoss()(LOGITS, SHARES)
    with pytest.raises(BadBatch, match="without a tensor"):
        logits_of(("a", 3))


class Labelled(nn.Module):
    """Computes its own loss where it is given labels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3).double()

    def forward(self, x, labels=None):
        logits = self.layer(x)
        return Output(logits, None if labels is None else 2 * F.cross_entropy(logits, labels))


def test_the_models_own_loss():
    model, batch = Labelled(), read_batch({"x": LOGITS, "labels": LABELS % 3}, 0, CPU)
    own = 2 * F.cross_entropy(model.layer(LOGITS), LABELS % 3)
    assert read_loss(None, batch) is LOSSES["model"]
    assert batch_loss(model, batch, LOSSES["model"]) == own
    assert LOSSES["model"].total(model(LOGITS, LABELS % 3), None, 4) == 4 * own
    torch.testing.assert_close(batch_loss(model, batch, LOSSES["cross_entropy"]), own / 2)
    with pytest.raises(BadBatch, match=r"has no \.loss; batches must be dicts with labels"):
        batch_loss(model, read_batch((LOGITS, LABELS), 0, CPU), LOSSES["model"])
    with pytest.raises(SecateurError, match="loss= is needed"):
        read_loss(None, read_batch((LOGITS, LABELS), 0, CPU))


MODULES = {
    "BCE": (nn.BCEWithLogitsLoss(), SHARES),
    "weighted": (nn.CrossEntropyLoss(weight=torch.arange(1.0, 6).double()), LABELS),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), LABELS),
    "NLL": (nn.NLLLoss(), LABELS),
    "huber": (nn.HuberLoss(), SHARES),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_a_mean_or_a_sum(name):
    module, targets = MODULES[name]
    loss = read_loss(module)
    assert loss.draw is None
    assert loss.mean(LOGITS, targets) == module(LOGITS, targets)
    assert loss.total(LOGITS, targets, 4) == 4 * module(LOGITS, targets)
    if name != "weighted":
        module.reduction = "sum"
        loss = read_loss(module)
        torch.testing.assert_close(loss.total(LOGITS, targets, 4), module(LOGITS, targets))
        torch.testing.assert_close(loss.mean(LOGITS, targets), module(LOGITS, targets) / 4)
        module.reduction = "mean"


def test_those_of_pytorch_that_mean_the_same_are_the_named_ones():
    assert read_loss(nn.CrossEntropyLoss()) is read_loss(F.cross_entropy) is LOSSES["cross_entropy"]
    assert read_loss(nn.MSELoss()) is read_loss(F.mse_loss) is LOSSES["mse"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("cross-entropy", "did you mean 'cross_entropy'"), (3, "an nn.Module or a callable"),
        (lambda o: o, "two arguments"), (nn.CTCLoss(), "two arguments"),
        (nn.BCEWithLogitsLoss(reduction="none"), "'mean' or 'sum' is expected"), (None, "loss= is needed"),
    ],
)  # fmt: skip
def test_what_is_no_loss_is_told(given, message):
    with pytest.raises(SecateurError, match=message):
        read_loss(given)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda o, t: o, r"one number as a tensor.*shape \[4, 5\]"), (lambda o, t: 3.0, "it gave a float"),
        (lambda o, t: o.sum() * float("nan"), "the loss of batch 3 is nan"),
        (lambda o, t: {}[t], "the loss does not fit the outputs and targets of batch 3"),
    ],
)  # fmt: skip
def test_a_loss_that_is_no_finite_number_is_told(value, message):
    with pytest.raises(BadBatch, match=message):
        batch_loss(nn.Identity(), read_batch((LOGITS, LABELS), 3, CPU), read_loss(value))


def test_a_loss_without_a_gradient_is_told():
    with pytest.raises(BadBatch, match="must depend on the outputs"):
        needs_gradient(LOGITS.sum())
