"""Heads, feed-forward layers and the residual stream of transformers are units, cut exactly."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn
from transformer_networks import FLOAT32_NORMS, NETWORKS, made

import secateur as sc
from secateur.measure.counting import count_macs, count_params

HEADS = 4
LEAST = {
    "BERT": 0.02, "GPT-2": 0.02, "OPT": 0.02, "GPT-NeoX": 0.02, "Llama": 0.04, "Qwen3": 0.04, "Gemma": 0.04, "T5": 0.02,
    "BART": 0.02, "Whisper": 0.03, "ViT": 0.03, "Swin": 0.04, "DeBERTa": 0.04, "CLIP": 0.03, "Mixtral": 0.04,
    "wav2vec2": 0.05,
}  # fmt: skip


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    model, inputs, outputs = made(request.param)
    return request.param, model, inputs, outputs, sc.trace(model, inputs, outputs=outputs)


def removal(graph, seed, groups=None):
    source = random.Random(seed)
    groups = [g for g in graph.groups if g.exact and len(g) > g.least] if groups is None else groups
    return {g.name: source.sample(range(len(g)), source.randint(1, len(g) - g.least)) for g in groups}


def heads(model, graph):
    """The groups whose channels are heads: few, and their first producer has several rows for each."""
    parameters = dict(model.named_parameters())
    first = {g.name: g.producers[0] for g in graph.groups}
    few = [g for g in graph.groups if len(g) <= HEADS]
    return [g for g in few if parameters[first[g.name].name].shape[first[g.name].dim] > len(g)]


@pytest.mark.parametrize("seed", range(2))
def test_half_of_the_heads_go_exactly(network, seed):
    _, model, inputs, outputs, graph = network
    units = heads(model, graph)
    assert units and {len(g) for g in units} <= {2, HEADS}
    source = random.Random(seed)
    removed = {g.name: source.sample(range(len(g)), len(g) // 2) for g in units}
    plan = sc.make_plan(graph, removed)
    small = sc.cut(model, plan)
    assert sc.check(model, small, plan, inputs, outputs=outputs) < 1e-10
    assert count_params(small) == graph.params(plan)
    if units:
        assert graph.params(plan) < graph.params()


@pytest.mark.parametrize("seed", range(3))
def test_all_that_can_go_goes_exactly(network, seed):
    name, model, inputs, outputs, graph = network
    plan = sc.make_plan(graph, removal(graph, seed))
    small = sc.cut(model, plan)
    allowed = 1e-5 if name in FLOAT32_NORMS else 1e-9
    assert sc.check(model, small, plan, inputs, outputs=outputs) < allowed
    given = (
        {**inputs, "use_cache": False} if name not in {"BERT", "ViT", "Swin", "DeBERTa", "CLIP", "wav2vec2"} else inputs
    )
    assert count_macs(small, given) == graph.macs(plan)
    assert count_params(small) == graph.params(plan)


def test_little_must_stay(network):
    name, *_, graph = network
    least, most = graph.feasible()["macs"]
    assert least / most <= LEAST[name]


def test_a_plan_comes_back_from_json_and_a_cut_model_from_disk(network, tmp_path):
    name, model, inputs, outputs, graph = network
    plan = sc.make_plan(graph, removal(graph, 5))
    again = sc.Plan.from_json(plan.to_json())
    assert again == plan and again.norms == plan.norms
    small = sc.cut(model, again)
    sc.save(small, tmp_path)
    loaded = sc.load(tmp_path, build=lambda: made(name)[0]).eval()
    assert sc.check(model, loaded, plan, inputs, outputs=outputs) < (1e-5 if name in FLOAT32_NORMS else 1e-9)


def test_a_second_round_is_as_exact_as_the_first(network):
    name, model, inputs, outputs, graph = network
    small = sc.cut(model, sc.make_plan(graph, removal(graph, 7)))
    second = sc.trace(small, inputs, outputs=outputs)
    plan = sc.make_plan(second, removal(second, 8))
    allowed = 1e-5 if name in FLOAT32_NORMS else 1e-9
    assert sc.check(small, sc.cut(small, plan), plan, inputs, outputs=outputs) < allowed


def test_gradients_are_those_of_the_masked_network(network):
    from secateur.surgery.channels import masked

    name, model, inputs, outputs, graph = network
    allowed = 1e-4 if name in FLOAT32_NORMS else 1e-8
    plan = sc.make_plan(graph, removal(graph, 9))
    small, whole = sc.cut(model, plan), masked(model, plan)
    for one in (small, whole):
        outputs(one(**inputs)).square().sum().backward()
    slices, wide = graph.slices(plan), dict(whole.named_parameters())
    narrowed = {path for path, norm in plan.norms.items() if norm.kind != "layer norm"}
    # a normalised weight is the same function of other numbers, so it has other gradients
    narrowed |= {name.rpartition(".")[0] for name in plan.weight_norms}
    for path, p in small.named_parameters():
        if p.grad is None or path.rpartition(".")[0] in narrowed:
            continue
        grad = wide[path].grad
        for dim, gone in slices.get(path, {}).items():
            kept = [i for i in range(wide[path].shape[dim]) if i not in set(gone)]
            grad = grad.index_select(dim, torch.tensor(kept))
        assert (p.grad - grad).abs().max() <= allowed * grad.abs().max().clamp(min=1e-3), path


@pytest.mark.parametrize("name", ["GPT-2", "OPT", "GPT-NeoX", "Llama", "Qwen3", "Gemma"])
def test_generation_goes_on_with_a_cache(name):
    model, inputs, outputs = made(name)
    graph = sc.trace(model, inputs, outputs=outputs)
    small = sc.cut(model, sc.make_plan(graph, removal(graph, 3, [g for g in graph.groups if len(g) <= 64])))
    given = {"input_ids": inputs["input_ids"], "attention_mask": torch.ones_like(inputs["input_ids"])}
    made_up = [
        small.generate(**given, max_new_tokens=6, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    ]
    assert torch.equal(*made_up)


def test_that_no_cache_was_used_is_told():
    model, inputs, outputs = made("GPT-2")
    assert "traced with use_cache=False" in " ".join(sc.trace(model, inputs, outputs=outputs).summary().split())
    said = {**inputs, "use_cache": False}
    assert not sc.trace(model, said, outputs=outputs).notes


# ------------------------------------------------------------------------------------------------ what is remembered


def patched(name, **removed):
    model, inputs, outputs = made(name)
    graph = sc.trace(model, inputs, outputs=outputs)
    groups = [g for g in graph.groups if len(g) in {2, HEADS, 64}]
    return model, sc.make_plan(graph, {g.name: [0] for g in groups}).patched


def test_the_numbers_of_the_models_python_are_found_by_what_they_do():
    _, found = patched("GPT-2")
    assert found["transformer.h.1.attn.split_size"] == (48, 36)
    assert found["transformer.h.0.attn.c_attn.nf"] == (144, 108)
    assert "transformer.h.0.attn.num_heads" not in found  # its forward never reads it
    _, found = patched("OPT")
    assert found["model.decoder.layers.0.self_attn.num_heads"] == (4, 3)


class OfAConfig(nn.Module):
    """Reads its heads off an object that all of its layers share."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.config.heads, 3).permute(2, 0, 3, 1, 4)
        y = torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1) @ v
        return x + self.out(y.transpose(1, 2).flatten(2))


def test_an_object_that_layers_share_is_their_own_where_it_changes():
    class Config:
        heads = 0

    config = Config()
    config.heads = 4
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), OfAConfig(config), OfAConfig(config), nn.Linear(12, 2)).double().eval()
    x = torch.randn(2, 6, 5).double()
    graph = sc.trace(model, x)
    plan = sc.make_plan(graph, {"1.qkv": [0], "2.qkv": [1, 3]})
    assert plan.patched["1.config.heads"] == (4, 3) and plan.patched["2.config.heads"] == (4, 2)
    small = sc.cut(model, plan)
    assert (config.heads, small[1].config.heads, small[2].config.heads) == (4, 3, 2)
    assert sc.check(model, small, plan, x) < 1e-12
    again = sc.cut(copy.deepcopy(model), sc.Plan.from_json(plan.to_json()))
    assert torch.equal(again(x), small(x))


def test_where_nothing_can_be_patched_the_line_is_named():
    class Literal(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out, self.up = nn.Linear(12, 36), nn.Linear(12, 12), nn.Linear(12, 7)

        def forward(self, x):
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 3).permute(2, 0, 3, 1, 4)
            y = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
            return self.out(self.up(y.transpose(1, 2).flatten(2)).relu() @ self.up.weight)

    graph = sc.trace(Literal(), torch.randn(2, 6, 12))
    (reason,) = {f.reason for f in graph.frozen if f.axis == "qkv.weight" and f.operation == "probe"}
    assert "test_transformers_cut.py:" in reason and ".view(*x.shape[:2], 3, 4, 3)" in reason


@pytest.mark.parametrize("name", ["BERT", "Llama", "Qwen3", "ViT"])
def test_training_with_checkpoints_of_activations(name):
    """A cut model trains with gradient checkpointing as without."""
    model, inputs, outputs = made(name)
    model.activation_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    graph = sc.trace(model.train(), inputs, outputs=outputs)
    small = sc.cut(model, sc.make_plan(graph, removal(graph, 11)))
    assert small.training and small.is_activation_checkpointing
    gradients = []
    for on in (True, False):
        small.activation_checkpointing_enable(
            {"use_reentrant": False}
        ) if on else small.activation_checkpointing_disable()
        small.zero_grad()
        outputs(
            small(**inputs, **({"use_cache": False} if name in {"Llama", "Qwen3"} else {}))
        ).square().sum().backward()
        gradients.append([p.grad.clone() for p in small.parameters() if p.grad is not None])
    assert gradients[0] and all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*gradients, strict=True))
