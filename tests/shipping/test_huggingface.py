"""Folders of ``transformers``: plain ``from_pretrained`` reads what was cut, and computes and generates the same."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers as tf
from torch import nn

import secateur as sc
from secateur._internal.errors import BadFile

TEXT = {"vocab_size": 64, "hidden_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 32}
IDS, IMAGES = torch.randint(3, 64, (2, 9)), torch.randn(2, 3, 16, 16)
FAMILIES = {
    "BERT": (
        lambda: tf.BertForSequenceClassification(
            tf.BertConfig(**TEXT, intermediate_size=192, num_attention_heads=4, num_labels=3)
        ),
        {"input_ids": IDS},
        ["bert.embeddings.*", "bert.pooler", "*.query"],
        {"intermediate_size"},
    ),
    "ViT": (
        lambda: tf.ViTForImageClassification(
            tf.ViTConfig(
                hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192, image_size=16,
                patch_size=4, num_labels=3,
            )
        ),
        {"pixel_values": IMAGES},
        ["vit.embeddings"],
        {"num_attention_heads", "head_dim", "intermediate_size"},
    ),
    "Llama": (
        lambda: tf.LlamaForCausalLM(
            tf.LlamaConfig(**TEXT, intermediate_size=96, num_attention_heads=6, num_key_value_heads=3)
        ),
        {"input_ids": IDS},
        ["model.embed_tokens"],
        {"num_attention_heads", "num_key_value_heads", "intermediate_size"},
    ),
    "GPT-2": (
        lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(
                vocab_size=64, n_embd=48, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2
            )
        ),
        {"input_ids": IDS},
        ["transformer.wte", "*.c_attn"],
        {"n_inner"},
    ),
    "T5": (
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(
                vocab_size=64, d_model=48, d_kv=12, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0
            )
        ),
        {"input_ids": IDS, "decoder_input_ids": IDS[:, :7]},
        ["shared"],
        {"num_heads", "d_ff"},
    ),
}  # fmt: skip


def whole(name):
    """A model with large random weights, so that every number of it counts."""
    torch.manual_seed(0)
    make, x, exclude, says = FAMILIES[name]
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model, x, exclude, says


def pruned(name, **how):
    model, x, exclude, _ = whole(name)
    how = {"params": 0.6, "round_to": 1, "alike": True} | how
    options = {"criterion": "magnitude", "strategy": "uniform", "outputs": lambda out: out.logits}
    return sc.prune(model, x, sc.Budget(**how), exclude=exclude, **options).model


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """All five at 60 % of the parameters, as folders, with what they gave; and what they give elsewhere."""
    folder, done = tmp_path_factory.mktemp("families"), {}
    recorded = {}
    for name, (_, x, _, _) in FAMILIES.items():
        small = pruned(name)
        done[name] = sc.export(small, folder / name, x, to="hf")
        with torch.no_grad():
            recorded[f"{name}/logits"] = small(**x).logits
            if hasattr(small, "generate") and "input_ids" in x and name != "BERT":
                recorded[f"{name}/tokens"] = small.generate(IDS, max_new_tokens=8, do_sample=False)
        recorded |= {f"{name}/{key}": value for key, value in x.items()}
    torch.save(recorded, folder / "recorded.pt")
    code = """
import json, sys
sys.modules["secateur"] = sys.modules["torchvision"] = None
import torch, transformers as tf
tf.logging.set_verbosity_error(); tf.logging.disable_progress_bar()
AUTO = {"BERT": tf.AutoModelForSequenceClassification, "ViT": tf.AutoModelForImageClassification,
        "Llama": tf.AutoModelForCausalLM, "GPT-2": tf.AutoModelForCausalLM, "T5": tf.AutoModelForSeq2SeqLM}
given, found = torch.load("recorded.pt"), {}
for name, auto in AUTO.items():
    model = auto.from_pretrained(name).eval()
    x = {k.split("/")[1]: v for k, v in given.items() if k.startswith(name + "/")}
    logits, tokens = x.pop("logits"), x.pop("tokens", None)
    with torch.no_grad():
        apart = (model(**x).logits - logits).abs().max().item()
        same = tokens is None or torch.equal(model.generate(x["input_ids"], max_new_tokens=8, do_sample=False), tokens)
    found[name] = [apart, same, sum(p.numel() for p in model.parameters())]
print(json.dumps(found))
"""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    return done, json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_transformers_reads_it_and_gives_the_same(families, name):
    done, elsewhere = families
    model, _, _, says = whole(name)
    assert set(done[name].facts["config"]) == says
    assert max(done[name].apart.values()) < 1e-6
    apart, same_tokens, params = elsewhere[name]
    assert apart == 0
    assert same_tokens
    assert params <= 0.6 * sum(p.numel() for p in model.parameters())
    assert f"config.{sorted(says)[0]}" in str(done[name])


def test_what_the_user_has_stays_as_it_was(tmp_path, untouched):
    small, x = pruned("Llama"), FAMILIES["Llama"][1]
    before = small.config.to_dict()
    with untouched(small):
        sc.export(small, tmp_path / "m", x, to="hf")
    assert small.config.to_dict() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m"]


def test_the_stream_of_a_llama_can_be_said_with_its_epsilon(tmp_path):
    model, x, _, _ = whole("Llama")
    small = sc.prune(
        model, x, sc.Budget(channels=0.91, round_to=12), exclude=["*.q_proj", "*.gate_proj"], criterion="magnitude",
        outputs=lambda out: out.logits,
    ).model  # fmt: skip
    done = sc.export(small, tmp_path / "m", x, to="hf")
    width = small.model.norm.weight.numel()
    assert done.facts["config"]["hidden_size"] == [48, width]
    assert done.facts["config"]["rms_norm_eps"][1] == pytest.approx(1e-6 * 48 / width, rel=1e-9)
    assert max(done.apart.values()) < 1e-6


def test_an_earlier_folder_is_replaced(tmp_path):
    small, x = pruned("GPT-2"), FAMILIES["GPT-2"][1]
    where = tmp_path / "m"
    where.mkdir()
    for name in ("model-00001-of-00002.safetensors", "tokenizer.json"):
        (where / name).write_text("old")
    sc.export(small, where, x, to="hf")
    assert {file.name for file in where.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip


def nothing_in(folder):
    return not list(folder.iterdir())


def test_widths_that_no_configuration_says_are_refused_with_two_ways_out(tmp_path):
    model, x, _, _ = whole("Llama")
    graph = sc.trace(model, x, outputs=lambda out: out.logits)
    names = [group.name for group in graph.groups if group.name.endswith("gate_proj")]
    uneven = sc.cut(model, sc.make_plan(graph, {names[0]: range(9), names[1]: range(30)}))
    with pytest.raises(sc.SecateurError, match=r"alike=True.*\*\.mlp\.gate_proj.*secateur\.load") as told:
        sc.export(uneven, tmp_path / "m", x, to="hf")
    assert f"{names[0]} (87 of 96)" in str(told.value)
    bert, x, _, _ = whole("BERT")
    graph = sc.trace(bert, x, outputs=lambda out: out.logits)
    queries = {group.name: [0] for group in graph.groups if group.name.endswith("query")}
    with pytest.raises(sc.SecateurError, match=r"exclude=\['\*\.attention\.self\.query'\]"):
        sc.export(sc.cut(bert, sc.make_plan(graph, queries)), tmp_path / "m", x, to="hf")
    assert nothing_in(tmp_path)


def test_layers_that_transformers_does_not_know_are_refused(tmp_path):
    model, x, _, _ = whole("GPT-2")
    graph = sc.trace(model, x, outputs=lambda out: out.logits)
    small = sc.cut(model, sc.make_plan(graph, {"transformer.wte": range(12)}))
    with pytest.raises(sc.SecateurError, match=r"transformer\.h\.0\.ln_1 is a NarrowLayerNorm"):
        sc.export(small, tmp_path / "m", x, to="hf")
    assert nothing_in(tmp_path)


def test_a_configuration_that_computes_something_else_is_refused(tmp_path):
    small, x = pruned("Llama"), FAMILIES["Llama"][1]
    small.model.layers[0].mlp.act_fn = nn.ReLU()
    with pytest.raises(sc.SecateurError, match=r"away from the model's.*secateur\.load"):
        sc.export(small, tmp_path / "m", x, to="hf")
    assert nothing_in(tmp_path)


class NeedsMore(tf.LlamaForCausalLM):
    """Cannot be built from its configuration."""

    def __init__(self, config, more):
        super().__init__(config)
        self.more = more


def test_a_class_that_asks_for_more_is_refused(tmp_path):
    model = NeedsMore(whole("Llama")[0].config, 1).eval()
    with pytest.raises(sc.SecateurError, match=r"cannot be built from its configuration alone \(TypeError"):
        sc.export(model, tmp_path / "m", {"input_ids": IDS}, to="hf")
    assert nothing_in(tmp_path)


def test_wrong_arguments_are_refused(tmp_path):
    small, x = pruned("GPT-2"), FAMILIES["GPT-2"][1]
    for wrong in ({"outputs": lambda out: out.logits}, {"opset": 18}, {"check": False}, {"dynamic": False}):
        with pytest.raises(sc.SecateurError, match="mean nothing here"):
            sc.export(small, tmp_path / "m", x, to="hf", **wrong)
    with pytest.raises(sc.SecateurError, match="a model of transformers is expected"):
        sc.export(nn.Linear(2, 2), tmp_path / "m", torch.randn(1, 2), to="hf")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BadFile, match="is a file"):
        sc.export(small, tmp_path / "file", x, to="hf")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(BadFile, match="cannot be"):
        sc.export(small, tmp_path / "file" / "m", x, to="hf")
