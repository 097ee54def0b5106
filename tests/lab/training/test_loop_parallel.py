"""Two processes train what one would: same weights and plan on both ranks, and those of one process in float64."""

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import forked
import secateur as sc
from secateur.lab.data.loader import Loader
from secateur.lab.training.loop import fit

CASES = ("sgd", "sdprun", "sdprun with batch norm")


def train(folder: Path, rank: str, case: str) -> None:
    """Train one small network and write its weights and the plan that is read off them."""
    from accelerate import Accelerator

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(43, 1, 6, 6, generator=generator, dtype=torch.float64)  # the last batch: 2 shares of 2 and 1
    labels = torch.randint(3, (43,), generator=generator)
    torch.manual_seed(5)
    norm = [nn.BatchNorm2d(8)] if "norm" in case else []
    model = nn.Sequential(nn.Conv2d(1, 8, 3), *norm, nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)).double()
    graph = sc.trace(model, images[:1])
    if case == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    else:
        optimizer = sc.SDPrun(model, graph, lr=0.1, c=6.0 if norm else 2.9)
    history = fit(
        model,
        optimizer,
        Loader(images, labels, 8, shuffle=True, augment=True, seed=2),
        epochs=2,
        schedule="cosine",
        checkpoint_dir=folder / case / f"steps-{os.environ.get('WORLD_SIZE', '1')}",
        every=0,
        accelerator=Accelerator(cpu=True),
        progress=False,
    )
    result = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    result["losses"] = torch.tensor([row["loss"] for row in history], dtype=torch.float64)
    save_file(result, folder / case / f"{rank}.safetensors")
    (folder / case / f"{rank}.json").write_text(sc.zero_channels(model, graph).to_json())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    for case in CASES:
        (folder / case).mkdir()
    forked.run_two(__file__, folder, environment={**os.environ, "ACCELERATE_USE_CPU": "true"})
    return folder


@pytest.mark.parametrize("case", CASES)
def test_both_ranks_hold_the_same(trained, case):
    first, second = (load_file(trained / case / f"{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    plans = [(trained / case / f"{rank}.json").read_text() for rank in (0, 1)]
    assert plans[0] == plans[1]
    assert case == "sgd" or 0 < len(sc.Plan.from_json(plans[0])) <= 7
    assert len(list((trained / case / "steps-2").iterdir())) == 2


@pytest.mark.parametrize("case", CASES[:2])
def test_two_processes_do_what_one_does(trained, case):
    train(trained, "one", case)
    one, first = (load_file(trained / case / f"{name}.safetensors") for name in ("one", "0"))
    assert all(torch.allclose(one[name], first[name], rtol=0, atol=1e-12) for name in one)
    assert (trained / case / "one.json").read_text() == (trained / case / "0.json").read_text()


if __name__ == "__main__":
    for each in CASES:
        train(Path(sys.argv[1]), os.environ["RANK"], each)
