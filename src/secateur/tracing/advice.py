"""What can be done about a reason for which channels are frozen or not exact."""

from __future__ import annotations

import re

NOTHING = "nothing: these positions are no channels"
_ADVICE = (
    (
        r"belongs to the model's output",
        "nothing, if these are the classes; else name what matters: outputs=lambda out: out.logits",
    ),
    (r"no rule knows the operation", "write it with operations of docs/operations.md; or leave it, the rest is cut"),
    (
        r"cannot bear it|fixes a (width|position)|computes a number from a width|takes another path|sets the scale",
        "let the forward take widths from its tensors (x.shape[-1], view with -1) or from a number on the module",
    ),
    (
        r"its value steers|may be read by",
        "give example inputs for each path: trace(model, [x1, x2])",
    ),
    (
        r"is not used as a channel|nothing writes it|no parameter was used",
        "give example inputs that use it, or leave it",
    ),
    (r"rows of a table|used as an index|sorted by expert|expert that is looked up|index says", NOTHING),
    (r"spatial position|place in a sequence|kernel position|values are taken from|by its place", NOTHING),
    (
        r"fixed position|positions (that )?are fixed",
        "see what else is frozen: it meets the model's inputs, zeros that padding adds, or a tensor that is no "
        "parameter and no buffer; register_buffer lets one be cut along (zeros too: torch.cat in place of F.pad)",
    ),
    (
        r"picked|put in order|searched|seen in windows|frequencies|diagonal|imaginary|squeezed|viewed|merged|broadcast"
        r"|moved by its place|compared with|normalised by",
        "do it along another dim than that of the channels; or leave it, the rest is cut",
    ),
    (r"written in place", "write into a tensor of its own (torch.cat, torch.where) instead of a view of this one"),
    (r"may be zero|not finite where", "add a small number to what is divided by, or the logarithm is taken of"),
    (r"only one of its kind", "nothing: a layer keeps its last channel"),
    (r"one kernel", "make the model traceable without values (torch.where instead of if), and its cells are cut"),
    (
        r"statistics over it|is taken over it|not zero|of weights|changes with its width|used elsewhere",
        "approximate=True cuts it anyway, and tells the difference",
    ),
)


def advice(reason: str) -> str:
    """What can be done about a reason, in words; empty if there is no advice for it."""
    return next((words for pattern, words in _ADVICE if re.search(pattern, reason)), "")
