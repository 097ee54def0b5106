"""Models and batches as transformers make them: dicts with labels, outputs with logits and a loss of their own."""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

import secateur as sc
from secateur.measure.accuracy import accuracy, loss
from secateur.scoring.contract import CRITERIA

try:
    import torchvision  # noqa: F401
except Exception:  # one that does not fit this torch would hide all models of transformers, which can do without
    sys.modules["torchvision"] = None
transformers = pytest.importorskip("transformers")

G = torch.Generator().manual_seed(0)
IDS, MASK = torch.randint(0, 50, (12, 7), generator=G), torch.ones(12, 7, dtype=torch.int64)
MASK[::3, 5:] = 0
CLASSES = torch.randint(0, 3, (12,), generator=G)
SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
LOOKING = [name for name in CRITERIA if CRITERIA.find(name).needs.data]


def bert():
    config = transformers.BertConfig(**SIZES, num_attention_heads=2, max_position_embeddings=32, num_labels=3)
    return transformers.BertForSequenceClassification(config), CLASSES


def llama():
    config = transformers.LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)
    return transformers.LlamaForCausalLM(config), torch.where(MASK == 0, -100, IDS)


def own_loss(output, labels):
    """What both compute where they are given labels."""
    if labels.ndim == 1:
        return F.cross_entropy(output.logits, labels)
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.fixture(scope="module", params=[bert, llama])
def case(request):
    torch.manual_seed(0)
    model, labels = request.param()
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    dicts = [{**{k: v[i : i + 4] for k, v in inputs.items()}, "labels": labels[i : i + 4]} for i in (0, 4, 8)]
    return model.eval(), sc.trace(model, {k: v[:2] for k, v in inputs.items()}), dicts


def pairs(dicts):
    return [({k: v for k, v in batch.items() if k != "labels"}, batch["labels"]) for batch in dicts]


def told(name, loss):
    """Without a way to draw targets the empirical Fisher is taken, and told."""
    draws = name == "taylor" or loss == "cross_entropy"
    return nullcontext() if draws else pytest.warns(sc.SecateurWarning, match="the empirical Fisher is used")


@pytest.mark.parametrize("name", LOOKING)
def test_a_dict_with_labels_brings_its_own_loss(case, name, untouched):
    model, graph, dicts = case
    with told(name, None), untouched(model):
        own = sc.score(model, graph, name, data=dicts)
    with told(name, own_loss):
        asked = sc.score(model, graph, name, data=pairs(dicts), loss=own_loss)
    assert own.keys() == asked.keys()
    assert any("layer" in group for group in own)
    for group in own:
        torch.testing.assert_close(own[group], asked[group])
    assert all("embed" in group for group in own.skipped)


@pytest.mark.parametrize("name", LOOKING)
def test_a_named_loss_takes_logits_and_labels_out_of_them(case, name):
    model, graph, dicts = case
    settings = name if name == "taylor" else {"name": name, "fisher": "empirical"}
    found = sc.score(model, graph, settings, data=dicts, loss="cross_entropy")

    def by_hand(output, labels):
        return F.cross_entropy(output.logits.flatten(0, -2), labels.flatten())

    if name == "taylor":
        wanted = sc.score(model, graph, name, data=pairs(dicts), loss=by_hand)
        for group in found:
            torch.testing.assert_close(found[group], wanted[group])
    assert all((scores.isfinite() | scores.isinf()).all() and scores.any() for scores in found.values())
    sc.score(model, graph, name, data=dicts, loss="cross_entropy")


@pytest.mark.parametrize("loss", [None, "cross_entropy"])
@pytest.mark.parametrize("repair", ["refit", "recalibrate", "compensate", "directed"])
def test_every_repair_takes_them(case, repair, loss, untouched):
    model, graph, dicts = case
    plan = sc.allocate(graph, sc.score(model, graph, "magnitude"), sc.Budget(channels=0.9))
    small = sc.cut(model, plan)
    before = copy.deepcopy(small.state_dict())
    looks = repair in {"compensate", "directed"}
    with told("taylor" if not looks else repair, loss), untouched(model):
        sc.apply_repair(model, small, plan, repair, data=dicts, loss=loss)
    changed = [name for name, value in small.state_dict().items() if not torch.equal(value, before[name])]
    assert bool(changed) == (repair != "recalibrate")
    with torch.no_grad():
        one, other = (m(**pairs(dicts)[0][0]).logits for m in (small, model))
    assert one.shape == other.shape


def test_prune_needs_no_loss(case):
    model, _, dicts = case
    inputs = {k: v[:2] for k, v in pairs(dicts)[0][0].items()}
    result = sc.prune(model, inputs, sc.Budget(channels=0.9), data=dicts)
    assert result.facts["chosen"]["criterion"]["name"] == "schur"
    assert result.facts["chosen"]["repair"][0]["name"] == "refit"
    assert result.after.params < result.before.params


def test_accuracy_and_loss_are_those_of_the_logits(case):
    model, _, dicts = case
    with torch.no_grad():
        output = model(input_ids=IDS, attention_mask=MASK)
        means = [float(own_loss(model(**inputs), labels)) for inputs, labels in pairs(dicts)]
    labels = torch.cat([batch["labels"] for batch in dicts])
    counted = labels != -100
    right = (output.logits.argmax(-1) == labels)[counted]
    assert accuracy(model, dicts) == pytest.approx(float(right.double().mean()))
    if labels.ndim == 1:
        assert loss(model, dicts) == pytest.approx(float(own_loss(output, labels)), rel=1e-5)
        assert loss(model, dicts, "model") == pytest.approx(float(own_loss(output, labels)), rel=1e-5)
    assert loss(model, dicts, "model") == pytest.approx(sum(means) / 3, rel=1e-5)
