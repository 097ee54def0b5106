"""The networks in bench/checkpoints are those that their index describes."""

import hashlib
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from secateur.lab.data.registry import folders, load
from secateur.lab.models.registry import build
from secateur.measure.accuracy import accuracy

FOLDER = Path(__file__).parents[3] / "bench" / "checkpoints"
INDEX = json.loads((FOLDER / "index.json").read_text())
FILES = [(network, run) for network in INDEX for run in network["seeds"]]
LEAST = {"lenet_300_100": 0.98, "lenet5": 0.99, "resnet20": 0.84, "resnet8": 0.79, "small_vit": 0.97}


@pytest.mark.parametrize(("network", "run"), FILES, ids=[run["file"] for _, run in FILES])
def test_file_is_the_one_of_the_index(network, run):
    content = (FOLDER / run["file"]).read_bytes()
    assert hashlib.sha256(content).hexdigest() == run["sha256"]
    assert len(content) <= 2_000_000
    build(network["model"]).load_state_dict(load_file(FOLDER / run["file"]))
    assert run["test_accuracy"] >= LEAST[network["model"]]


def test_every_file_is_in_the_index():
    assert {path.name for path in FOLDER.glob("*.safetensors")} == {run["file"] for _, run in FILES}


def _each(network):
    """A ResNet-20 takes a quarter of a minute; a smaller one of the same kind and data is beside it."""
    marks = [pytest.mark.slow] if network["model"] == "resnet20" else []
    return pytest.param(network, marks=marks, id=network["model"])


@pytest.mark.parametrize("network", [_each(network) for network in INDEX])
def test_accuracy_is_the_one_of_the_index(network):
    if not any((folder / network["data"] / "test.parquet").is_file() for folder in folders(None)):
        pytest.skip(f"no {network['data']} parquet files here: set SECATEUR_DATA to a folder that holds them")
    data, run = load(network["data"], validation=network["validation"]), network["seeds"][0]
    assert data.notes == network["data_note"]
    model = build(network["model"])
    model.load_state_dict(load_file(FOLDER / run["file"]))
    assert accuracy(model, data.loader("validation", 500)) == pytest.approx(run["validation_accuracy"], abs=2e-3)
