"""One file of plain PyTorch: layers with the widths that are left, and a forward that can be read.

The forward is the graph of ``torch.export``, written as a person would: a layer of ``torch.nn`` is called by its path,
an operation by its usual name, and a name is used again once its value is no longer needed. A model that is made of
``torch.nn`` alone, layers in ``nn.Sequential``, is written as such. The weights lie beside in safetensors, with inputs
and outputs for the file's own check.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import keyword
import math
import operator
import re
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten

from secateur._internal.batches import tensors_in
from secateur._internal.errors import SecateurError
from secateur.shipping.parity import Runs, apart_from, others
from secateur.shipping.programs import Chosen, Exportable, free_sizes

INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "truediv": "/", "floordiv": "//", "mod": "%", "pow": "**",
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "and_": "&", "or_": "|", "matmul": "@",
    "bitwise_and": "&", "bitwise_or": "|", "__and__": "&", "__or__": "|",
}  # fmt: skip
VALUES, NUMBERS = ("x", "y", "z", "u", "v", "w"), ("n", "m")
"""What values are called, the first that is free; after these x1, y1, ..."""
TAKEN = {"self", "torch", "nn", "F", "math", "operator", "device", "float", "getattr", "setattr", "super", "range"}
CHECK = "//check/"
"""What the names of recorded tensors begin with, and no path does."""
READ = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64,
)  # fmt: skip
"""What the file can read."""
RESERVED = {
    "Part", "Path", "WEIGHTS", "TYPES", "TIED", "FROZEN", "network", "read", "load", "recorded", "check", "apart",
    "json",
} | TAKEN  # fmt: skip
"""What a class in the file may not be called."""
IMPLIED = ("pin_memory", "layout")
"""Keywords that say nothing of tensors as they usually are, and that not every operation takes by its usual name."""
TO_THE_END = 2**63 - 1
ELSEWHERE = "export to .pt2 or .onnx, which can hold it"


def write(what: Exportable, program: ExportedProgram, path: Path, weights: Path) -> Runs:
    """Write a model as a file of Python and one of weights; how that runs.

    Args:
        what: the model, and examples.
        program: its graph.
        path: the file of Python.
        weights: the file of weights, in the same folder; the other knows it by its name.

    Raises:
        SecateurError: an operation that plain PyTorch has no text for.
    """
    recorded = _recorded(what, program)
    expected = tensors_in(what.run(what.args, what.kwargs))

    def runs(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        spec = importlib.util.spec_from_file_location("secateur_exported", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with torch.no_grad():
            return tensors_in(module.load()(*(tensor.cpu() for tensor in tensors)))

    for called in (True, False):  # where a layer is not called as its class calls it, operations are written out
        text = Text(what, program, called=called)
        kept = {name: t.detach().cpu().contiguous().clone() for name, t in (text.weights() | recorded).items()}
        wrong = sorted({str(t.dtype) for t in kept.values()} - {str(dtype) for dtype in READ})
        if wrong:
            raise SecateurError(f"export(to='python'): the file cannot hold {', '.join(wrong)}; {ELSEWHERE}")
        save_file(kept, weights)
        path.write_text(text.file(weights.name), "utf-8")
        try:
            given = runs(what.tensors)
        except Exception:  # the next, or whoever compares, tells
            continue
        if len(given) == len(expected) and all(
            a.shape == b.shape and apart_from(a, b) < 1e-3 for a, b in zip(expected, given, strict=True)
        ):
            break
    return runs


def _recorded(what: Exportable, program: ExportedProgram) -> dict[str, Tensor]:
    """Random inputs, of other sizes where the model bears them, and what it gives."""
    for free in (free_sizes(what, program), {}):
        args, kwargs = others(what, free, seed=1)
        try:
            outputs = tensors_in(what.run(args, kwargs))
        except Exception:  # it does not bear these sizes
            continue
        found = {f"{CHECK}input/{i}": t for i, t in enumerate(tensors_in((args, kwargs)))}
        return found | {f"{CHECK}output/{i}": t for i, t in enumerate(outputs)}
    raise SecateurError("export(to='python'): the model does not run on random inputs of its example's sizes")


class Text:
    """A model as text.

    Args:
        what: the model and examples.
        program: its graph.
        called: whether layers of ``torch.nn`` are called; else their operations are written out.

    Raises:
        SecateurError: an operation that plain PyTorch has no text for.
    """

    def __init__(self, what: Exportable, program: ExportedProgram, *, called: bool = True) -> None:
        self.what, self.program = what, program
        self.root: nn.Module = what.model.model if isinstance(what.model, Chosen) else what.model
        self.modules = dict(self.root.named_modules(remove_duplicate=False))
        self.tensors = self._tensors()
        self.called = called
        plain = called and not isinstance(what.model, Chosen)
        self.sequence = sequence_text(self.root, 4) if plain else None
        self.imports: set[str] = set()
        self.moves = False  # whether the forward makes tensors, which are to be where its input is
        self.used: dict[str, None] = {}  # paths of layers and tensors
        self.inputs = self._input_names()
        self.body = self._forward() if self.sequence is None else ""

    # ------------------------------------------------------------------------------------------------------ the tensors

    def _own(self, path: str) -> str:
        """A path of the graph's as one of the model's."""
        return path.removeprefix("model.") if isinstance(self.what.model, Chosen) else path

    def _tensors(self) -> dict[str, tuple[str, Tensor]]:
        """By the graph's name the path of each tensor that is no input, and the tensor."""
        found = {}
        for spec in self.program.graph_signature.input_specs:
            name, target = getattr(spec.arg, "name", ""), str(spec.target)
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                state = self.program.state_dict
                found[name] = (self._own(target), state[target] if target in state else self.program.constants[target])
            elif spec.kind is not InputKind.USER_INPUT:
                raise SecateurError(f"export(to='python'): the model holds {name}, which is no tensor; {ELSEWHERE}")
        return found

    def _saved(self) -> dict[str, Tensor]:
        """All tensors that the text's network has, by path."""
        if self.sequence is not None:
            return self.root.state_dict(keep_vars=True)
        of_path = dict(self.tensors.values())
        found = {}
        for path in self.used:
            if path in of_path:
                found[path] = of_path[path]
            else:
                layer = self.modules[path].state_dict(keep_vars=True)
                found |= {f"{path}.{name}": tensor for name, tensor in layer.items()}
        return found

    def _tied(self) -> dict[str, str]:
        """Tensors that are one with another -> that other."""
        first: dict[Any, str] = {}
        found = {}
        for name, tensor in self._saved().items():
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if tensor.numel() and first.setdefault(key, name) != name:
                found[name] = first[key]
        return found

    def weights(self) -> dict[str, Tensor]:
        """What is saved, by path; of tensors that are one the first."""
        return {name: tensor for name, tensor in self._saved().items() if name not in self._tied()}

    # ------------------------------------------------------------------------------------------------------ the forward

    def _input_names(self) -> list[str]:
        """What the forward takes: its tensors by the names that they have there."""
        found = []
        for path, leaf in tree_flatten_with_path(self.what.inputs())[0]:
            if isinstance(leaf, Tensor):
                keys = (getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))) for key in path)
                name = re.sub(r"\W", "_", "_".join(map(str, keys)))
                while name in TAKEN or keyword.iskeyword(name) or name in found or not name.isidentifier():
                    name = f"{name}_" if name.isidentifier() else f"input_{name}"
                found.append(name)
        return found

    def _forward(self) -> str:
        """The lines of the forward."""
        graph, signature = self.program.graph_module.graph, self.program.graph_signature
        wrong = [str(spec.arg) for spec in signature.output_specs if spec.kind is not OutputKind.USER_OUTPUT]
        if wrong:
            raise SecateurError(
                f"export(to='python'): the forward changes {', '.join(wrong)}, besides what it returns; {ELSEWHERE}"
            )
        user = [s.arg.name for s in signature.input_specs if s.kind is InputKind.USER_INPUT if hasattr(s.arg, "name")]
        places = {node.name: node for node in graph.nodes if node.op == "placeholder"}
        given = [places[name] for name in user if isinstance(places[name].meta.get("val"), Tensor)]
        names = dict(zip(given, self.inputs, strict=True))
        calls = [node for node in graph.nodes if node.op == "call_function"]
        last = last_uses(calls, graph.output_node())
        layers = self._layers(calls) if self.called else set()
        held, lines, shown = set(names.values()), [], ""
        for node in calls:
            if node not in last and not mutates(node):
                continue
            layer = self._layer_of(node, layers)
            text = self._call(node, names, layer)
            region = layer.rpartition(".")[0] if layer else self._path_of(node)
            if region != shown and region:
                lines.append(f"# {region}")
            shown = region
            held -= {names[other] for other in node.all_input_nodes if last.get(other) is node and other in names}
            if node in last:
                tensor = isinstance(node.meta.get("val"), (Tensor, list, tuple))
                names[node] = first_free(held, VALUES if tensor else NUMBERS)
                held.add(names[node])
                text = f"{names[node]} = {text}"
            lines.append(text)
        spec = self.program.call_spec.out_spec
        assert spec is not None
        returned: Any = graph.output_node().args[0]
        if self.moves:
            lines.insert(0, f"device = {self.inputs[0]}.device")
        lines.append(f"return {rendered(tree_unflatten([Word(self._value(v, names)) for v in returned], spec))}")
        return "\n".join(lines)

    def _path_of(self, node: Node) -> str:
        """The path of the module whose forward an operation is in."""
        stack = list(node.meta.get("nn_module_stack", {}).values())
        path = self._own(str(stack[-1][0])) if stack else ""
        return path if path in self.modules else ""

    def _layers(self, calls: Sequence[Node]) -> set[str]:
        """Paths of layers of ``torch.nn`` that are one operation, and can be made again from what they show."""
        targets: dict[str, set[Any]] = {}
        for node in calls:
            targets.setdefault(self._path_of(node), set()).add(node.target)
        return {path for path, own in targets.items() if len(own) == 1 and path and layer_text(self.modules[path])}

    def _layer_of(self, node: Node, layers: Collection[str]) -> str:
        """The path of the layer that an operation is, if it is one, of one value."""
        path = self._path_of(node)
        own = [self.tensors[o.name][0] for o in node.all_input_nodes if o.name in self.tensors]
        values = len(node.all_input_nodes) - len(own)
        return path if path in layers and values == 1 and all(o.rpartition(".")[0] == path for o in own) else ""

    def _call(self, node: Node, names: Mapping[Node, str], layer: str) -> str:
        """An operation as text."""
        if layer:
            value = next(other for other in node.all_input_nodes if other.name not in self.tensors)
            return f"{self._at(layer)}({self._value(value, names)})"
        held = [other for other in node.all_input_nodes if other.op == "get_attr"]
        if held or isinstance(node.target, torch._ops.HigherOrderOperator):
            raise SecateurError(
                f"export(to='python'): {getattr(node.target, '__name__', node.target)} (control flow, or a mode such "
                f"as autocast) has no plain text; {ELSEWHERE}"
            )
        args = [self._value(value, names) for value in node.args]
        more = [f"{key}={self._value(v, names)}" for key, v in node.kwargs.items() if key not in IMPLIED]
        both, target = ", ".join([*args, *more]), node.target
        if not isinstance(target, torch._ops.OpOverload):
            return self._python_call(target, args, both)
        if target.namespace != "aten":
            raise SecateurError(f"export(to='python'): {target} is no operation of plain PyTorch; {ELSEWHERE}")
        name, schema = target._schema.name.removeprefix("aten::"), target._schema.arguments
        if name in INFIX and len(args) == 2 and not more:
            return infix(args[0], INFIX[name], args[1])
        if name == "sym_size":
            return f"{args[0]}.shape[{args[1]}]"
        if name == "index" and isinstance(node.args[1], (list, tuple)):
            places = (":" if place is None else self._value(place, names) for place in node.args[1])
            return f"{args[0]}[{', '.join(places)}]"
        if name == "slice" and args[1].isdigit():
            return f"{args[0]}[{sliced(*args[1:])}]"
        if schema and schema[0].name == "self" and inspect.ismethoddescriptor(getattr(Tensor, name, None)):
            return f"{args[0]}.{name}({', '.join([*args[1:], *more])})"
        if inspect.isbuiltin(getattr(torch, name, None)):
            return f"torch.{name}({both})"
        if inspect.isbuiltin(getattr(F, name, None)):
            self.imports.add("import torch.nn.functional as F")
            return f"F.{name}({both})"
        overload = "" if target._overloadname == "default" else f".{target._overloadname}"
        return f"torch.ops.aten.{name}{overload}({both})"

    def _python_call(self, target: Any, args: list[str], both: str) -> str:
        """An operation on whole numbers, or on a container."""
        name, home = getattr(target, "__name__", str(target)), getattr(target, "__module__", "").lstrip("_")
        if target is operator.getitem:
            return f"{args[0]}[{args[1]}]"
        if name in INFIX and len(args) == 2:
            return infix(args[0], INFIX[name], args[1])
        if home in ("math", "operator"):
            self.imports.add(f"import {home}")
            return f"{home}.{name}({both})"
        if getattr(torch, name, None) is target:
            return f"torch.{name}({both})"
        raise SecateurError(f"export(to='python'): {name} has no plain text; {ELSEWHERE}")

    def _value(self, value: Any, names: Mapping[Node, str]) -> str:
        """An argument as text."""
        if isinstance(value, Node):
            return self._at(self.tensors[value.name][0]) if value.name in self.tensors else names[value]
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self._value(v, names) for v in value)}]"
        if isinstance(value, torch.device):
            self.moves = True
            return "device"
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")'
        if isinstance(value, (type(None), bool, int, float, str, torch.dtype, torch.layout, torch.memory_format)):
            return repr(value)
        raise SecateurError(f"export(to='python'): {value!r} has no plain text; {ELSEWHERE}")

    # --------------------------------------------------------------------------------------------------------- the file

    def _at(self, path: str) -> str:
        """A layer or a tensor; :meth:`file` says how it is reached, once all are known."""
        self.used[path] = None
        return f"\0{path}\0"

    def file(self, weights: str) -> str:
        """The text of the file.

        Args:
            weights: the name of the file of weights.
        """
        kind, tied = type(self.root).__name__, self._tied()
        count = sum(p.numel() for p in self.root.parameters())
        head = HEAD.format(kind=kind, count=count, weights=weights)
        for line in sorted(self.imports):
            after = "import torch\n" if "torch" in line else "import json\n"
            head = head.replace(after, f"{after}{line}\n", 1)
        frozen = [name for name, t in self._saved().items() if isinstance(t, nn.Parameter) and not t.requires_grad]
        ties = f"TIED = {tied!r}\n" * bool(tied) + f"FROZEN = {frozen!r}\n" * bool(frozen)
        network = NETWORK.format(self.sequence) if self.sequence is not None else self._class(kind)
        tail = TAIL.replace("# TIED\n", f"{TIES}\n" * bool(tied))
        tail = tail.replace("# AND SO ON\n", TIE * bool(tied) + FREEZE * bool(frozen))
        return f"{head}{ties}\n\n{network}\n\n{tail}"

    def _class(self, kind: str) -> str:
        """The network as a class."""
        tree = Part()
        for path in self.used:
            tree.put(path.split("."), self._text_of(path))
        made = "\n".join([f"super().__init__({tree.inside()})", *tree.lines("self")])
        body = re.sub("\0(.+?)\0", lambda found: tree.reached("self", found[1].split(".")), self.body)
        name = re.sub(r"\W", "", kind)
        if type(self.root).__module__.startswith("torch.") or name in RESERVED or not name.isidentifier():
            name = "Network"
        part = 'class Part(nn.Module):\n    """Layers by their names."""\n\n\n' if "= Part()" in made else ""
        return (
            f"{part}class {name}({'nn.Module' if tree.base == 'Part' else tree.base}):\n"
            f"    def __init__(self):\n{textwrap.indent(made, ' ' * 8)}\n\n"
            f"    def forward(self, {', '.join(self.inputs)}):\n{textwrap.indent(body, ' ' * 8)}\n\n\n"
            f"network = {name}\n"
        )

    def _text_of(self, path: str) -> str:
        """What makes a layer, or a tensor."""
        tensor = dict(self.tensors.values()).get(path)
        if tensor is None:
            return str(layer_text(self.modules[path]))
        kind = "nn.Parameter" if isinstance(tensor, nn.Parameter) else "nn.Buffer"
        still = ", requires_grad=False" if isinstance(tensor, nn.Parameter) and not tensor.requires_grad else ""
        return f"{kind}(torch.empty({list(tensor.shape)}){still})"


@dataclass
class Part:
    """What a path holds: a layer, a tensor, or other parts."""

    text: str = ""
    parts: dict[str, Part] = field(default_factory=dict)

    def put(self, path: Sequence[str], text: str) -> None:
        """Let it hold something."""
        if not path:
            self.text = text
        else:
            self.parts.setdefault(path[0], Part()).put(path[1:], text)

    @property
    def base(self) -> str:
        """The class of a container with such names."""
        numbers = [int(name) for name in self.parts if name.isdigit() and str(int(name)) == name]
        if numbers and len(numbers) == len(self.parts):
            tensors = [part.text.startswith(("nn.Parameter", "nn.Buffer")) for part in self.parts.values()]
            if all(tensors) and max(numbers) + 1 == len(numbers):
                return "nn.ParameterList"
            if not any(tensors) and max(numbers) < 2 * len(numbers) + 2:  # layers that do nothing leave gaps
                return "nn.ModuleList"
        return "Part"

    def inside(self) -> str:
        """What a container is made with, so that all its numbers are there."""
        if self.base == "Part":
            return ""
        of = "nn.Identity()" if self.base == "nn.ModuleList" else "torch.empty(0)"
        return f"{of} for _ in range({max(map(int, self.parts)) + 1})"

    def lines(self, access: str) -> Iterator[str]:
        """Lines that make all that is in it."""
        for name, part in self.parts.items():
            own = self.reached(access, [name])
            made = part.text or f"{part.base}({part.inside()})"
            yield f"setattr({access}, {name!r}, {made})" if own.startswith("getattr(") else f"{own} = {made}"
            yield from part.lines(own)

    def reached(self, access: str, path: Sequence[str]) -> str:
        """How the text reaches something in it."""
        if not path:
            return access
        name = path[0]
        if self.base != "Part":
            step = f"{access}[{name}]"
        elif name.isidentifier() and not keyword.iskeyword(name):
            step = f"{access}.{name}"
        else:  # a name that only a dict of modules can have
            step = f"getattr({access}, {name!r})"
        return self.parts[name].reached(step, path[1:])


@dataclass(frozen=True)
class Word:
    """The text of a value, in the place of the value."""

    text: str


def rendered(value: Any) -> str:
    """What a forward returns as text; what is a dict of fields, as outputs of ``transformers`` are, as a dict."""
    if isinstance(value, Word):
        return value.text
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {rendered(v)}' for key, v in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(rendered, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(rendered, value))}{',' * (len(value) == 1)})"
    if value is None:
        return "None"
    raise SecateurError(
        f"export(to='python'): the forward returns a {type(value).__name__}, which has no plain text; outputs= chooses "
        "what is in it"
    )


def last_uses(calls: Sequence[Node], output: Node) -> dict[Node, Node]:
    """By each value that is needed what needs it last."""
    found = dict.fromkeys(output.all_input_nodes, output)
    for node in reversed(calls):
        if node in found or mutates(node):
            for other in node.all_input_nodes:
                found.setdefault(other, node)
    return found


def mutates(node: Node) -> bool:
    """Whether an operation changes what it is given."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def first_free(held: Collection[str], names: Sequence[str]) -> str:
    """The first name that nothing has."""
    every = (name + (str(number) if number else "") for number in itertools.count() for name in names)
    return next(name for name in every if name not in held)


def infix(one: str, sign: str, other: str) -> str:
    """Two values with a sign between; ``-2 ** x`` would be another number."""
    return f"({one}) {sign} {other}" if one.startswith("-") else f"{one} {sign} {other}"


def sliced(dim: str, start: str = "None", end: str = "None", step: str = "1") -> str:
    """The index of a slice."""
    begin = "" if start in ("None", "0") else start
    stop = "" if end in ("None", str(TO_THE_END)) else end
    return f"{':, ' * int(dim)}{begin}:{stop}" + (f":{step}" if step != "1" else "")


def layer_text(module: nn.Module) -> str | None:
    """What makes a layer of ``torch.nn`` again, if what it shows of itself does."""
    kind = type(module)
    if getattr(nn, kind.__name__, None) is not kind or next(module.children(), None) is not None or has_more(module):
        return None
    text = f"nn.{kind.__name__}({module.extra_repr()})"
    try:
        with torch.device("meta"):
            again = eval(text, {"nn": nn, "torch": torch})
    except Exception:  # what it shows is no call
        return None
    shapes, own = ({name: t.shape for name, t in m.state_dict().items()} for m in (again, module))
    return text if type(again) is kind and shapes == own and plain(again) == plain(module) else None


def has_more(module: nn.Module) -> bool:
    """Whether something that its class does not say is in its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def plain(module: nn.Module) -> dict[str, Any]:
    """What a module remembers besides tensors, of what has a text."""
    kinds = (bool, int, float, str, tuple, type(None))
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and isinstance(value, kinds)
    }


def sequence_text(module: nn.Module, indent: int) -> str | None:
    """What makes layers of ``torch.nn`` in ``nn.Sequential`` again, if they are nothing else."""
    if type(module) is not nn.Sequential:
        return layer_text(module)
    own = module._parameters or module._buffers or has_more(module)
    if own or list(module._modules) != [str(i) for i in range(len(module))]:
        return None
    inside = [sequence_text(part, indent + 4) for part in module]
    if not inside or any(text is None for text in inside):
        return None
    lines = ",\n".join(f"{' ' * (indent + 4)}{text}" for text in inside)
    return f"nn.Sequential(\n{lines},\n{' ' * indent})"


TIES = "    weights |= {name: weights[other] for name, other in TIED.items()}"
TIE = """    for name, other in TIED.items():
        (path, _, last), (its_path, _, its) = name.rpartition("."), other.rpartition(".")
        setattr(model.get_submodule(path), last, getattr(model.get_submodule(its_path), its))
"""
FREEZE = """    for name in FROZEN:
        model.get_parameter(name).requires_grad_(False)
"""
HEAD = '''"""{kind} with {count:,} parameters, as secateur left it. It needs PyTorch and nothing else.

``load()`` gives the network with its weights. Run as a script, it checks that it computes what was recorded.
"""

import json
from pathlib import Path

import torch
from torch import nn

WEIGHTS = Path(__file__).with_name({weights!r})
'''
NETWORK = """def network():
    return {}
"""
TAIL = '''TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "C64": torch.complex64,
}


def read(path=WEIGHTS):
    """All tensors of a file in the safetensors format, by name."""
    found = {}
    with open(path, "rb") as file:
        head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = file.tell()
        for name, of in head.items():
            if name != "__metadata__":
                begin, end = of["data_offsets"]
                file.seek(start + begin)
                data, kind = bytearray(file.read(end - begin)), TYPES[of["dtype"]]
                tensor = torch.frombuffer(data, dtype=kind) if data else torch.empty(0, dtype=kind)
                found[name] = tensor.reshape(of["shape"])
    return found


def load():
    """The network with its weights, in eval mode, on the CPU."""
    weights = {name: tensor for name, tensor in read().items() if not name.startswith("//check/")}
# TIED
    with torch.device("meta"):
        model = network()
    model.load_state_dict(weights, assign=True)
# AND SO ON
    return model.eval()


def recorded(kind):
    """Inputs, or outputs, that were recorded."""
    found = {int(name.split("/")[-1]): t for name, t in read().items() if name.startswith(f"//check/{kind}/")}
    return [found[number] for number in sorted(found)]


def check():
    """How far outputs are from those that were recorded, in units of the largest."""
    with torch.no_grad():
        found = torch.utils._pytree.tree_leaves(load()(*recorded("input")))
    found = [tensor for tensor in found if isinstance(tensor, torch.Tensor)]
    expected = recorded("output")
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf")
    return max(apart(a.double(), b.double()) for a, b in zip(found, expected) if b.numel())


def apart(found, expected):
    """The largest difference; what is the same, infinite or no number, is none."""
    same = (found == expected) | (found.isnan() & expected.isnan())
    unit = expected.masked_fill(~expected.isfinite(), 0).abs().max().clamp(min=1e-12)
    return float(((found - expected).abs() / unit).masked_fill(same, 0).max())


if __name__ == "__main__":
    difference = check()
    print(f"largest difference to what was recorded: {difference:.1e}")
    raise SystemExit(not difference < 1e-2)
'''
