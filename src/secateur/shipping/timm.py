"""What timm calls a pruned model: the shapes of all tensors in a line of text, and the weights.

timm keeps its own pruned networks so (``timm/models/_pruned``), and its ``adapt_model_from_string`` makes the layers of
a model anew with these shapes. It knows convolutions without groups or depthwise, batch norms and linears.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from secateur._internal.errors import BadFile, SecateurError
from secateur._internal.importing import package
from secateur._internal.records import record
from secateur.tracing.display import LONGEST, listed

SEPARATOR = "***"
KNOWN = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)


def pruned_text(model: nn.Module) -> str:
    """The shapes of a cut model, as timm reads them.

    Raises:
        SecateurError: layers were cut that timm does not make anew.
    """
    modules = dict(model.named_modules())
    steps = [json.loads(text) for step in record(model) for kind, text in step.items() if kind == "cut"]
    others = [kind for step in record(model) for kind in step if kind != "cut"]
    wrong = {}
    for path in {name.rpartition(".")[0] for step in steps for name in step.get("slices", {})}:
        module = modules.get(path)
        grouped = isinstance(module, nn.Conv2d) and module.groups not in (1, module.out_channels)
        if not isinstance(module, KNOWN) or grouped:
            wrong[path] = f"{path} is a {'grouped ' * grouped}{type(module).__name__}"
    if wrong or others:
        told = listed([*wrong.values(), *(f"{kind} was applied" for kind in others)], LONGEST, 4)
        raise SecateurError(
            f"export(to='timm'): {told}, which timm does not make anew; leave it whole (exclude=), or keep the model "
            "with secateur.save, and load it with secateur.load"
        )
    return SEPARATOR.join(f"{name}:{list(tensor.shape)}" for name, tensor in model.state_dict().items())


def read_pruned(model: nn.Module, path: str | Path) -> nn.Module:
    """The pruned model that an export describes, made by timm from the original.

    Args:
        model: the original, ``timm.create_model(name)``; it is left untouched.
        path: the text; its weights lie beside.

    Raises:
        BadFile: there is no text, or no weights.
        SecateurError: timm is not here.
    """
    where = Path(path)
    weights = sorted(where.parent.glob(f"{where.stem}.*.safetensors"))
    if not where.is_file() or len(weights) != 1:
        raise BadFile(f"{where}: a text that secateur.export(to='timm') wrote, and its weights beside, are expected")
    text = where.read_text("utf-8").strip()
    adapted: Any = package("timm.models._prune", "reading a pruned model of timm", "timm").adapt_model_from_string
    small: nn.Module = adapted(model, text)
    small.load_state_dict(load_file(weights[0]))
    return small.eval()
