"""``SDPrun.step`` against ``torch.optim.SGD(momentum=0.9, foreach=True)`` on the parameters of a ResNet-50, in one run.

Steps of the two alternate, so that whatever else the machine does meets both; the ratio is that of the medians. Prints
a table, writes ``bench/results/step.json``::

    python bench/step.py --steps 40 --threads 1 2
    python bench/step.py --device cuda
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import secateur as sc
from networks import RESNETS, ResNet
from secateur.methods.sdprun import SDPrun

RESULTS = Path(__file__).parent / "results" / "step.json"
TARGET = 1.15
WARM_UP = 5


def bytes_of(tensors: Iterable[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def state_bytes(optimizer: Optimizer) -> int:
    return bytes_of(value for state in optimizer.state.values() for value in state.values())


def index_bytes(optimizer: SDPrun) -> int:
    """What SDPrun keeps besides its state: indices, norms and factors of rows."""
    pruned = optimizer._pruned
    blocks = [value for block in pruned.channels._blocks for value in vars(block).values()]
    return bytes_of([*blocks, *pruned.channels._rows, pruned.weight, pruned.constant])


def timed(optimizer: Optimizer, device: torch.device) -> tuple[float, float]:
    """Milliseconds that a step takes by the clock, and of the process's own time."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start, own = time.perf_counter(), time.process_time()
    optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - own)


def with_gradients(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = (1e-3 * torch.randn(p.shape, generator=generator)).to(p.device)
    return model


def measure(ours: Optimizer, theirs: Optimizer, device: torch.device, steps: int) -> dict[str, float]:
    """Medians, in milliseconds, of alternating steps, and their ratios."""
    times: dict[Optimizer, list[tuple[float, float]]] = {ours: [], theirs: []}
    for i in range(WARM_UP + steps):
        for optimizer in (ours, theirs) if i % 2 else (theirs, ours):
            times[optimizer].append(timed(optimizer, device))
    (a, own_a), (b, own_b) = (zip(*pairs[WARM_UP:], strict=True) for pairs in times.values())
    return {
        "sdprun_ms": statistics.median(a),
        "sgd_ms": statistics.median(b),
        "ratio": statistics.median(a) / statistics.median(b),
        "ratio_of_fastest": min(a) / min(b),
        "ratio_of_process_time": statistics.median(own_a) / statistics.median(own_b),
    }


def processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="measured steps of each, per number of threads")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()

    device = torch.device(options.device)
    torch.manual_seed(0)
    model = ResNet(RESNETS[50])
    graph = sc.trace(model, torch.randn(1, 3, 64, 64))
    model = with_gradients(model.to(device))
    other = with_gradients(copy.deepcopy(model))
    ours = SDPrun(model, graph, lr=0.1, c=5e-4, mu=0.6)
    theirs = SGD(other.parameters(), lr=0.1, momentum=0.9, foreach=True)

    rows = []
    for threads in options.threads if device.type == "cpu" else [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        rows.append({"threads": threads, **measure(ours, theirs, device, options.steps)})
        row = rows[-1]
        print(
            f"threads {threads}: SDPrun {row['sdprun_ms']:.2f} ms, SGD with momentum {row['sgd_ms']:.2f} ms, "
            f"ratio {row['ratio']:.3f} (target {TARGET}); of the fastest {row['ratio_of_fastest']:.3f}, "
            f"of process times {row['ratio_of_process_time']:.3f}"
        )
    result = {
        "what": "one optimizer step on the parameters of a ResNet-50, float32",
        "parameters": sum(p.numel() for p in model.parameters()),
        "tensors": sum(1 for _ in model.parameters()),
        "steps": options.steps,
        "target_ratio": TARGET,
        "rows": rows,
        "state_bytes": {"sdprun": state_bytes(ours), "sgd": state_bytes(theirs)},
        "index_bytes": index_bytes(ours),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "torch": torch.__version__,
    }
    print(
        f"state: SDPrun {result['state_bytes']['sdprun']:,} bytes and {result['index_bytes']:,} of indices, "
        f"SGD with momentum {result['state_bytes']['sgd']:,} bytes"
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
