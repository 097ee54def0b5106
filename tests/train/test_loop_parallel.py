"""Two processes train what one would: same weights on both ranks, and the weights of one process in float64."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from secateur.data import Loader
from secateur.train.loop import fit


def train(folder: Path, rank: str) -> None:
    """Train one small network and write its weights."""
    from accelerate import Accelerator

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(43, 1, 6, 6, generator=generator, dtype=torch.float64)  # the last batch: 2 shares of 2 and 1
    labels = torch.randint(3, (43,), generator=generator)
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = Loader(images, labels, 8, shuffle=True, augment=True, seed=2)
    history = fit(
        model,
        optimizer,
        loader,
        epochs=2,
        schedule="cosine",
        checkpoint_dir=folder / f"steps-{os.environ.get('WORLD_SIZE', '1')}",
        every=0,
        accelerator=Accelerator(cpu=True),
        progress=False,
    )
    result = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    result["losses"] = torch.tensor([row["loss"] for row in history], dtype=torch.float64)
    save_file(result, folder / f"{rank}.safetensors")


def test_two_processes_do_what_one_does(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    train(tmp_path, "one")
    one, first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "0", "1"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.allclose(one[name], first[name], rtol=0, atol=1e-12) for name in one)
    assert len(list((tmp_path / "steps-2").iterdir())) == 2


if __name__ == "__main__":
    train(Path(sys.argv[1]), os.environ["RANK"])
