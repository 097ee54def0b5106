"""``secateur prune``, ``measure`` and their words: a model of one's own, without a recipe."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import secateur as sc
from secateur import cli
from secateur.lab.given import Source, data_of, described, drawn_inputs, drawn_like, outputs_of, read_input
from secateur.lab.models import elsewhere

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.a, self.b = nn.Conv2d(width, 24, 3, padding=1), nn.Linear(24, 10), nn.Linear(24, 2)

    def forward(self, x):
        x = self.conv2(self.bn(self.conv1(x)).relu()).relu().mean((2, 3))
        return {"digit": self.a(x), "odd": self.b(x)}

def make(width=16):
    return Net(width)

def odd_make(width=16):
    return Net(width + 1)

X = torch.randn(96, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(96) % 10
BATCHES = [(X[i:i + 16], Y[i:i + 16]) for i in range(0, 96, 16)]

def loader():
    return torch.utils.data.DataLoader(list(zip(X, Y)), 16)

def stream():
    yield from BATCHES

def without_targets():
    return [x for x, _ in BATCHES]

def broken():
    raise RuntimeError("no disk")

def loss(out, y):
    return nn.functional.cross_entropy(out["digit"], y) + nn.functional.cross_entropy(out["odd"], y % 2)

def accuracy(model):
    assert not model.training
    return {"digit": (model(X)["digit"].argmax(1) == Y).float().mean(), "odd": 0.5}

def words(model):
    return "good"

def inputs():
    return X[:2]

def broken_make():
    raise RuntimeError("no such board")

def nan(model):
    print("evaluating")
    return {"loss": float("nan"), "fine": 1.0}
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with a module of the user's, and weights."""
    (tmp_path / "own_net.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("own_net", None)
    module = __import__("own_net")
    torch.manual_seed(0)
    save_file(module.make().state_dict(), "w.safetensors")
    yield module
    sys.modules.pop("own_net", None)


def called(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


BASE = ["prune", "own_net:make", "--weights", "w.safetensors", "--data", "own_net:loader", "--loss", "own_net:loss"]
ASKED = [*BASE, "--budget", "macs=0.4", "--evaluate", "own_net:accuracy", "--quiet"]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts)


def test_a_model_of_ones_own_is_pruned_tuned_saved_and_shipped(own, tmp_path):
    result = called(*ASKED, "--finetune", 2, "--out", "small")
    assert result.exit_code == 0, result.output
    for word in ("macs", "params", "digit", "odd", "before fine-tuning", "conv1", "small: secateur.load reads it"):
        assert word in result.output
    saved = ["README.md", "model.safetensors", "report.html", "secateur.json"]
    assert files(tmp_path) == ["own_net.py", "small", *(f"small/{name}" for name in saved), "w.safetensors"]
    small = sc.load("small", build=own.make)
    graph = sc.trace(own.make(), own.X[:1])
    assert sc.trace(small, own.X[:1]).macs() <= 0.4 * graph.macs()
    notes = json.loads((tmp_path / "small" / "secateur.json").read_text())["notes"]
    assert notes["evaluated"]["tuned"]["digit"] == pytest.approx(float(own.accuracy(small.eval())["digit"]))
    assert len(notes["history"]) == 2
    again = called(*ASKED, "--finetune", 2, "--out", "small")
    assert again.exit_code == 0
    assert "macs" in again.output
    other = called(*ASKED, "--finetune", 1, "--out", "small")
    assert other.exit_code == 2
    assert "made otherwise" in other.stderr
    assert called(*ASKED, "--out", "small", "--fresh").exit_code == 0
    done = called("export", "small", "--build", "own_net:make", "--out", "small.py", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["free"] == {"x": [0]}
    timed = called(
        "measure", "small", "--build", "own_net:make", "--threads", 1, "--batch", 1, "--batch", 3, "--json", "--quiet"
    )
    assert timed.exit_code == 0, timed.output
    timings = json.loads(timed.stdout)["timings"]
    assert [(t["model"], t["batch"]) for t in timings] == [
        ("original", 1),
        ("pruned", 1),
        ("original", 3),
        ("pruned", 3),
    ]


def test_json_is_all_that_is_printed(own):
    result = called(*ASKED, "--out", "small", "--json")
    found = json.loads(result.stdout)
    assert found["after"]["macs"] <= 0.4 * found["before"]["macs"]
    assert set(found["evaluated"]) == {"before", "pruned"}
    graph = json.loads(called("inspect", "own_net:make", "--input", "1,1,8,8", "--json").stdout)
    assert {group["name"] for group in graph["groups"]} == {"conv1", "conv2"}


def test_outputs_exclude_method_and_no_data(own):
    result = called(
        "prune", "own_net:make", "width=12", "--input", "1,1,8,8", "--budget", "params=0.8", "--exclude", "conv1",
        "--outputs", "digit", "--out", "a", "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    small = sc.load("a", build=lambda: own.make(12))
    assert small.conv1.out_channels == 12
    assert small.conv2.out_channels < 24
    hybrid = called(*BASE, "--budget", "params=0.5", "--method", "hybrid", "--out", "b", "--quiet")
    assert hybrid.exit_code == 0, hybrid.output
    assert sum(p.numel() for p in sc.load("b", build=own.make).parameters()) <= 0.5 * sum(
        p.numel() for p in own.make().parameters()
    )


def test_interrupted_anywhere_it_ends_the_same(own, tmp_path, monkeypatch):
    asked = [*ASKED, "--finetune", 3]
    assert called(*asked, "--out", "whole").exit_code == 0
    from secateur.lab.training import loop

    step = loop._Run.train_step
    for stop in (1, 8, 18):  # in the first epoch, in the second, in the last step
        count = iter(range(1, 100))

        def train_step(self, raw, check, stop=stop, count=count):
            if next(count) == stop:
                raise KeyboardInterrupt
            return step(self, raw, check)

        out = f"part{stop}"
        monkeypatch.setattr(loop._Run, "train_step", train_step)
        result = called(*asked, "--out", out)
        assert result.exit_code == cli.INTERRUPTED
        assert "the same command goes on" in result.stderr
        assert not (tmp_path / out).exists()
        other = called(*ASKED, "--finetune", 2, "--out", out)
        assert other.exit_code == 2
        assert "another command" in other.stderr
        monkeypatch.setattr(loop._Run, "train_step", step)
        assert called(*asked, "--out", out).exit_code == 0
        assert not (tmp_path / f"{out}.unfinished").exists()
        one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", out))
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_killed_it_goes_on_and_ends_the_same(own, tmp_path):
    asked = [*ASKED, "--finetune", "150", "--threads", "1"]
    assert called(*asked, "--out", "whole").exit_code == 0
    command = [sys.executable, "-m", "secateur", *asked, "--out", "small"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    checkpoints = tmp_path / "small.unfinished" / "checkpoints"
    begun = time.monotonic()
    while not (checkpoints.is_dir() and any(checkpoints.iterdir())) and time.monotonic() - begun < 60:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert any(checkpoints.iterdir())
    assert not (tmp_path / "small").exists()
    done = called(*[word for word in asked if word != "--quiet"], "--out", "small")
    assert done.exit_code == 0
    assert "goes on after pruning" in done.stderr
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "small"))
    assert all(torch.equal(one[name], two[name]) for name in one)


TUNED = ["--budget", "macs=0.5", "--finetune", "1"]
BAD = {
    "no budget": ([*BASE], "--budget KEY=VALUE is needed"),
    "a budget of nothing": ([*BASE, "--budget", "macs=0"], "keeps nothing"),
    "no key": ([*BASE, "--budget", "0.5"], "KEY=VALUE is expected, such as macs=0.5"),
    "unknown unit": ([*BASE, "--budget", "flops=0.5"], "the word here is macs="),
    "unreachable": ([*BASE, "--budget", "macs=0.0001"], "feasible are"),
    "unknown method": ([*ASKED, "--method", "hybird"], "did you mean 'hybrid'"),
    "method and seat": ([*ASKED, "--method", "hybrid", "--criterion", "taylor"], "leave --criterion out"),
    "unknown criterion": ([*ASKED, "--criterion", "magnitud"], "did you mean 'magnitude'"),
    "unknown loss": ([*BASE[:6], "--loss", "crossentropy", "--budget", "macs=0.5"], "--loss 'crossentropy'"),
    "no such module": (["prune", "nowhere:make", "--budget", "macs=0.5"], "cannot import"),
    "no inputs": (["prune", "own_net:make", "--budget", "macs=0.5"], "nobody knows its inputs"),
    "broken data": ([*BASE[:4], "--data", "own_net:broken", "--budget", "macs=0.5"], "RuntimeError: no disk"),
    "no data": ([*BASE[:4], "--data", "own_net:make", "--budget", "macs=0.5"], "something that gives batches"),
    "a stream to tune on": ([*BASE[:4], "--data", "own_net:stream", *BASE[6:], *TUNED], "has no length"),
    "nothing to tune by": ([*BASE[:6], "--budget", "macs=0.5", "--finetune", "1"], "--finetune needs"),
    "other weights": (["prune", "own_net:odd_make", *BASE[2:], "--budget", "macs=0.5"], "w.safetensors"),
    "words": ([*BASE, "--budget", "macs=0.5", "--evaluate", "own_net:words"], "numbers by name, are expected"),
    "two kinds of inputs": ([*ASKED, "--input", "1,1,8,8", "--inputs", "own_net:inputs"], "give one of them"),
    "a budget twice": ([*BASE, "--budget", "macs=0.5", "--budget", "macs=0.4"], "macs= is given twice"),
    "a learning rate below zero": ([*ASKED, "--finetune", "1", "--lr", "-1"], "--lr"),
    "a learning rate that is none": ([*ASKED, "--finetune", "1", "--lr", "nan"], "--lr"),
    "complex inputs": ([*ASKED, "--input", "1,1,8,8:complex64"], "positive whole numbers"),
    "numbers that do not fit": ([*ASKED, "--input", "1,1,8,8:int8:1000"], "positive whole numbers"),
    "inputs that fail": ([*ASKED, "--inputs", "own_net:broken"], "RuntimeError: no disk"),
    "a factory that fails": (["prune", "own_net:broken_make", "--budget", "macs=0.5"], "its factory fails"),
    "a file in the way": ([*ASKED, "--fresh", "--out", "w.safetensors"], "it is a file"),
    "deep": ([*BASE, "--budget", "macs=0.0001", "--out", "a/b/c"], "feasible are"),
    "unknown group": ([*ASKED, "--exclude", "conv3"], "did you mean 'conv"),
    "no such device": ([*ASKED, "--device", "cuda:77"], "--device cuda:77"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_and_nothing_is_written(case, own, tmp_path):
    arguments, message = BAD[case]
    out = [] if "--out" in arguments else ["--out", "small"]
    result = called(*arguments, *out, "--quiet")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
    assert files(tmp_path) == ["own_net.py", "w.safetensors"]


def test_folders_of_others_are_left_alone(own, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    result = called(*ASKED, "--out", "mine")
    assert result.exit_code == 2
    assert "it holds other files" in result.stderr
    assert called(*ASKED, "--out", "w.safetensors").exit_code == 2
    assert files(tmp_path / "mine") == ["thesis.tex"]


def test_what_is_somebody_elses_stays(own, tmp_path):
    (tmp_path / "small.unfinished").mkdir()
    (tmp_path / "small.unfinished" / "precious").write_text("mine")
    for more in ([], ["--fresh"]):
        result = called(*ASKED, "--out", "small", *more)
        assert result.exit_code == 2
        assert "somebody else's" in result.stderr
    assert (tmp_path / "small.unfinished" / "precious").read_text() == "mine"
    assert not (tmp_path / "small").exists()


def test_a_model_is_not_written_over_itself(own, tmp_path):
    asked = ["prune", "digits_cnn", "--budget", "macs=0.5", "--out", "digits_cnn", "--quiet", "--json"]
    first, again = called(*asked), called(*asked, "--fresh")
    assert json.loads(first.stdout)["before"] == json.loads(again.stdout)["before"]  # the built-in one, not the folder
    itself = called("prune", "./digits_cnn", "--budget", "macs=0.5", "--out", "digits_cnn", "--fresh")
    assert itself.exit_code == 2
    assert "the model is read from there" in itself.stderr


def test_numbers_that_are_none_and_prints_do_not_break_json(own, tmp_path):
    asked = [*BASE, "--budget", "macs=0.5", "--evaluate", "own_net:nan", "--json", "--quiet"]
    first, again = called(*asked), called(*asked)
    assert json.loads(first.stdout)["evaluated"]["before"] == {"loss": None, "fine": 1.0}
    assert json.loads(again.stdout) == json.loads(first.stdout)
    assert "nan" in called(*asked[:-2], "--quiet").stdout


def test_other_weights_of_the_same_name_are_another_question(own, tmp_path):
    assert called(*ASKED, "--out", "small").exit_code == 0
    torch.manual_seed(1)
    save_file(own.make().state_dict(), "w.safetensors")
    result = called(*ASKED, "--out", "small")
    assert result.exit_code == 2
    assert "made otherwise" in result.stderr


def test_an_interrupted_fresh_start_goes_on_without_the_word(own, tmp_path, monkeypatch):
    from secateur.lab.training import loop

    assert called(*ASKED, "--out", "small").exit_code == 0
    step, count = loop._Run.train_step, iter(range(100))

    def train_step(self, raw, check):
        if next(count) == 8:
            raise KeyboardInterrupt
        return step(self, raw, check)

    monkeypatch.setattr(loop._Run, "train_step", train_step)
    result = called(*ASKED, "--finetune", 3, "--out", "small", "--fresh")
    assert result.exit_code == cli.INTERRUPTED
    assert "without --fresh goes on" in result.stderr
    monkeypatch.setattr(loop._Run, "train_step", step)
    done = called(*[word for word in ASKED if word != "--quiet"], "--finetune", 3, "--out", "small")
    assert done.exit_code == 0
    assert "goes on after pruning" in done.stderr
    notes = json.loads((tmp_path / "small" / "secateur.json").read_text())["notes"]
    assert "tuned" in notes["evaluated"]
    assert not (tmp_path / "small.unfinished").exists()


def test_a_stream_loses_no_batch(own):
    assert len(list(data_of("own_net:stream"))) == len(own.BATCHES)


# ----------------------------------------------------------------------------------------------------------- the words


@pytest.mark.parametrize(
    ("text", "shape", "dtype", "name"),
    [("1,3,8,8", [1, 3, 8, 8], torch.float32, None), ("ids=2,5:int64:7", [2, 5], torch.int64, "ids"),
     ("3:bool", [3], torch.bool, None), ("m=4:float64", [4], torch.float64, "m")],
)  # fmt: skip
def test_an_input_in_words(text, shape, dtype, name):
    found = drawn_inputs([read_input(text)])
    tensor = found if name is None else found[name]
    assert list(tensor.shape) == shape
    assert tensor.dtype == dtype
    if dtype == torch.int64:
        assert 0 <= tensor.min() <= tensor.max() < 7
    again = drawn_like(json.loads(json.dumps(described(found))))
    tensor_again = again if name is None else again[name]
    assert (tensor_again.shape, tensor_again.dtype) == (tensor.shape, tensor.dtype)


@pytest.mark.parametrize("text", ["", "1,x", "0,3", "=1,3", "1,3:int65", "1,3:int64:0", "1,3:int64:x", "1,3:nn"])
def test_what_is_no_input_is_refused(text):
    with pytest.raises(sc.SecateurError, match="positive whole numbers is expected"):
        read_input(text)


def test_some_with_names_and_some_without_are_refused():
    with pytest.raises(sc.SecateurError, match="either all inputs have names"):
        drawn_inputs([read_input("a=1,2"), read_input("1,2")])
    assert len(drawn_inputs([read_input("1,2"), read_input("1,2")])) == 2


def test_outputs_in_words():
    out = {"heads": [torch.zeros(1), {"b": torch.ones(2)}], "logits": torch.zeros(3)}
    assert outputs_of("heads.1.b")(out).shape == (2,)
    assert outputs_of("logits")(out).shape == (3,)
    assert outputs_of(None) is None


def test_other_packages_models(monkeypatch, tmp_path):
    with pytest.raises(sc.SecateurError, match=r"a model of torchvision needs torchvision.*pip install torchvision"):
        elsewhere.build("torchvision:resnet18")
    made = []

    class Timm:
        @staticmethod
        def create_model(name, **options):
            made.append((name, options))
            model = nn.Sequential(nn.Conv2d(3, options["width"], 1))
            model.default_cfg = {"input_size": (3, 10, 10)}
            return model

    monkeypatch.setitem(sys.modules, "timm", Timm)
    source = Source("timm:net", {"width": 4})
    assert source.example(source.network("inspect")).shape == (1, 3, 10, 10)
    assert made == [("net", {"width": 4})]
    with pytest.raises(sc.SecateurError, match=r"timm does not make it \(KeyError: 'width'\)"):
        elsewhere.build("timm:net")


def test_a_model_of_transformers_by_its_folder(tmp_path, monkeypatch):
    import transformers as tf

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    tf.LlamaForCausalLM(config).save_pretrained("whole")
    result = called(
        "prune", "hf:whole", "--budget", "params=0.8", "--budget", "alike=true", "--budget", "round_to=1", "--outputs",
        "logits", "--exclude", "model.embed_tokens", "--out", "small", "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    done = called("export", "small", "--build", "hf:whole", "--to", "hf", "--out", "small_hf")
    assert done.exit_code == 0, done.output
    assert "config.intermediate_size: 32 -> " in done.output
    again = tf.AutoModelForCausalLM.from_pretrained("small_hf")
    assert sum(p.numel() for p in again.parameters()) <= 0.8 * sum(
        p.numel() for p in tf.LlamaForCausalLM(config).parameters()
    )
    missing = called("inspect", "hf:nowhere-at-all")
    assert missing.exit_code == 2
    assert "hf does not make it" in missing.stderr
