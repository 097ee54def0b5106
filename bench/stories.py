"""A language model that others trained, pruned without training: stories260K (karpathy/llama2.c, MIT).

A Llama of 260,032 parameters, five layers, heads in groups, tied embeddings, in Hugging Face's layout. It is pruned
with sequences that it wrote itself (512 of 128 tokens, drawn at temperature 1), and judged by the mean negative
log-likelihood of 128 others of its own, in nats a token: of the whole model that is the entropy of what it writes. The
seed draws the sequences. Configurations are criterion, strategy and repair, as in ``bench/ablation.py``; ``auto`` is
``schur/global/refit`` here. Rows that are there are not run again. ``FOLDER`` holds ``stories260k.safetensors`` and
``stories260k.json`` (the config)::

    python bench/stories.py FOLDER --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import secateur as sc
from oneshot import HERE
from rows import Row, Rows

CONFIGURATIONS = (
    "auto", "magnitude/uniform/none", "magnitude/uniform/refit", "taylor/uniform/none", "taylor/global/none",
    "taylor/uniform/refit", "schur/global/none", "schur/uniform/refit", "hybrid/auto",
    "auto+distill",
)  # fmt: skip
PARAMS = (0.9, 0.8, 0.6)
SEEN, TESTED, LENGTH, BATCH, STEPS = 512, 128, 128, 32, 200


def whole(folder: Path) -> nn.Module:
    """The model as it was trained."""
    sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]  # it need not fit the PyTorch that is here
    from transformers import LlamaConfig, LlamaForCausalLM

    given = json.loads((folder / "stories260k.json").read_text())
    given = given.get("config", given)
    config = LlamaConfig(**{k: v for k, v in given.items() if k not in ("pieces", "architectures")})
    config.tie_word_embeddings = True
    model = LlamaForCausalLM(config)
    model.load_state_dict(load_file(folder / "stories260k.safetensors"), strict=False)
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def written(model: Any, count: int, seed: int) -> Tensor:
    """Token ids [count, LENGTH] that the model writes after its first token."""
    torch.manual_seed(seed)
    begin = torch.ones(count, 1, dtype=torch.int64)
    return model.generate(
        begin, attention_mask=torch.ones_like(begin), do_sample=True, temperature=1.0, top_k=0,
        min_new_tokens=LENGTH - 1, max_new_tokens=LENGTH - 1, pad_token_id=0,
    )  # fmt: skip


@torch.no_grad()
def likelihood(model: Any, ids: Tensor) -> float:
    """Mean negative log-likelihood, in nats a token."""
    return float(torch.stack([model(input_ids=some, labels=some).loss for some in ids.split(BATCH)]).mean())


def smaller(name: str, model: nn.Module, budget: sc.Budget, data: list[dict[str, Tensor]], seed: int) -> Any:
    """What a configuration makes of the model."""
    inputs = {"input_ids": data[0]["input_ids"][:2, :32]}
    if name == "hybrid/auto":
        return sc.hybrid(model, inputs, budget, data=data)
    if name.startswith("auto"):
        more: dict[str, Any] = {"repair": ["refit", sc.Distill(steps=STEPS, seed=seed)]} if "distill" in name else {}
        return sc.prune(model, inputs, budget, data=data, **more)
    criterion, strategy, repair = name.split("/")
    return sc.prune(model, inputs, budget, data=data, criterion=criterion, strategy=strategy, repair=repair)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(CONFIGURATIONS), choices=CONFIGURATIONS, metavar="METHOD")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "stories.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = Rows(given.out, sequences=SEEN, tested=TESTED, length=LENGTH, unit="nats a token")
    model = whole(given.folder)
    for seed in given.seeds:
        ids = written(model, SEEN + TESTED, seed)
        data = [{"input_ids": some, "labels": some} for some in ids[:SEEN].split(BATCH)]
        test = ids[SEEN:]
        for name in ("dense", *given.methods):
            for fraction in (1.0,) if name == "dense" else PARAMS:
                row: Row = {"seed": seed, "method": name, "fraction": fraction}
                if rows.has(row):
                    continue
                if name != "dense":
                    start = time.perf_counter()
                    try:
                        result = smaller(name, model, sc.Budget(params=fraction), data, seed)
                    except sc.SecateurError as error:
                        row["refused"] = str(error).split(":")[0]
                    else:
                        row["seconds"] = round(time.perf_counter() - start, 2)
                        row |= {u: getattr(result.after, u) / getattr(result.before, u) for u in ("macs", "params")}
                        row["nats"] = likelihood(result.model, test)
                else:
                    row["nats"] = likelihood(model, test)
                rows.add(row)
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


if __name__ == "__main__":
    main()
