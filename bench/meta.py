"""How long a trace takes beside the model's own forward on the meta device, and what large shapes take in memory.

Networks of ``bench/networks.py``, small transformers of ``tests/tracing/transformer_networks.py``, and two shapes of
Llama, of one and of eight billion parameters, in a process of their own each. Prints a table, writes
``bench/results/meta.json``::

    python bench/meta.py
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "tracing"))
sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils._pytree import tree_map  # noqa: E402

import secateur as sc  # noqa: E402
from networks import ZOO  # noqa: E402
from secateur._internal.batches import call_without_cache  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "meta.json"
LLAMA = {
    "Llama, 1B": {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192},
    "Llama, 8B": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336},
}
MAY = "10 forwards and 1 s"


def median(function: Callable[[], Any], repeats: int) -> float:
    """Seconds, the median of some calls."""
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def forward_on_meta(model: nn.Module, inputs: Any, repeats: int) -> tuple[float | None, str]:
    """Seconds of the model's own forward on the meta device, or why there is none."""
    other = copy.deepcopy(model).to("meta").eval()
    given = tree_map(lambda v: v.to("meta") if isinstance(v, torch.Tensor) else v, inputs)
    try:
        with torch.no_grad():
            call_without_cache(other, given)
            return median(lambda: call_without_cache(other, given), repeats), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"


def row(name: str, model: nn.Module, inputs: Any, outputs: Any, repeats: int) -> dict[str, Any]:
    """Both times of one network."""
    model.eval()
    forward, why = forward_on_meta(model, inputs, repeats)
    sc.trace(model, inputs, outputs=outputs)
    trace = median(lambda: sc.trace(model, inputs, outputs=outputs), repeats)
    return {"network": name, "forward": forward, "trace": trace, "why": why}


def llama(name: str) -> dict[str, Any]:
    """Time and peak memory of tracing a large shape, in this process, the first call of it."""
    import transformers

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    config = transformers.LlamaConfig(vocab_size=128256, num_attention_heads=32, num_key_value_heads=8, **LLAMA[name])
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).eval()
        inputs = {"input_ids": torch.zeros(1, 16, dtype=torch.long)}
    forward, why = forward_on_meta(model, inputs, 3)
    begun = time.perf_counter()
    graph = sc.trace(model, inputs, outputs=lambda out: out.logits)
    trace = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # of the process, PyTorch and all
    return {"network": name, "forward": forward, "trace": trace, "why": why, "params": graph.params(), "peak_gb": peak}


def show(one: dict[str, Any]) -> str:
    """One line of the table."""
    forward, trace = one["forward"], one["trace"]
    own = f"{forward:.3f}" if forward is not None else "-"
    within = f"{'within' if trace <= 10 * (forward or 0) + 1 else 'NOT within'} {MAY}"
    if "peak_gb" in one:
        within = f"{one['params'] / 1e9:.1f} B parameters, peak {one['peak_gb']:.2f} GB"
    why = f"; its own forward on meta fails: {one['why']}" if one["why"] else ""
    return f"{one['network']:<16}{own:>10}{trace:>10.3f}  {within}{why}"


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    from transformer_networks import NETWORKS, made

    print(f"{'network':<16}{'forward s':>10}{'trace s':>10}")
    rows = []
    for name, make in ZOO.items():
        rows.append(row(name, make(), torch.randn(1, 3, 224, 224), None, args.repeats))
        print(show(rows[-1]), flush=True)
    for name in NETWORKS:
        rows.append(row(name, *made(name), args.repeats))
        print(show(rows[-1]), flush=True)
    for name in LLAMA:
        with multiprocessing.get_context("spawn").Pool(1) as own:
            rows.append(own.apply(llama, (name,)))
        print(show(rows[-1]), flush=True)
    args.out.write_text(json.dumps({"torch": torch.__version__, "threads": 1, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
