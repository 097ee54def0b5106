"""``zero``: what training has driven to exact zero goes; nothing is judged, and nothing else is changed.

For networks that :class:`secateur.SDPrun`, a group lasso or another tool has trained to zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from secateur._internal.batches import Inputs
from secateur._internal.checks import check_flag
from secateur._internal.errors import SecateurError
from secateur._internal.workload import Needs, Workload
from secateur.allocation.budget import Budget
from secateur.measure.layers import layer_data
from secateur.methods.contract import METHODS, described
from secateur.methods.layer_selection import check_exclude
from secateur.result import Result, counts_of
from secateur.surgery.channels import cut
from secateur.surgery.zero_channels import zero_channels
from secateur.tracing.api import trace
from secateur.tracing.selection import Exclude


@METHODS.register("zero")
@dataclass(frozen=True)
class Zero:
    """Cut off every channel that is exactly zero at all that writes it.

    Attributes:
        exclude: what keeps its channels: patterns of group names or module paths, modules, or types of modules.
        approximate: also cut groups whose removal changes more than the removed channels.
    """

    needs: ClassVar[Needs] = Needs()
    takes_budget: ClassVar[bool] = False
    needs_optimizer: ClassVar[str] = "sdprun"
    exclude: Exclude = ()
    approximate: bool = False

    def __post_init__(self) -> None:
        check_exclude(self.exclude)
        check_flag("approximate", self.approximate)

    def apply(self, model: nn.Module, inputs: Inputs, budget: Budget | None, work: Workload) -> Result:
        """The model without its zero channels; of a model that has none a copy, which is told."""
        if budget is not None:
            raise SecateurError("method 'zero' takes what is zero, however much that is: leave the budget out")
        graph = trace(model, inputs)
        plan = zero_channels(model, graph, exclude=self.exclude, approximate=self.approximate)
        if not len(plan):
            work.note(
                "method 'zero': no channel is zero at all that writes it (filter, bias, and weight and bias of its "
                "norm), so none is cut"
            )
        facts = {"chosen": {"method": described(self)}, "notices": list(work.notices)}
        small = cut(model, plan)
        layers = layer_data(model, small, inputs)
        return Result(small, counts_of(graph), counts_of(graph, plan), plan, graph, facts=facts, layers=layers)
