"""``nn.MultiheadAttention`` and ``nn.Transformer*``: heads are units, in every way in which the modules can be set."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.tracing.attentions import HeadAttention, attentions_of, free_heads

D, HEADS, T, S, N = 12, 3, 5, 7, 2


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """PyTorch warns of its own nested tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randomised(model: nn.Module) -> nn.Module:
    source = torch.Generator().manual_seed(3)
    for tensor in model.double().parameters():
        tensor.data.copy_(torch.randn(tensor.shape, generator=source, dtype=torch.float64) * 0.3)
    return model.eval()


OPTIONS = [
    {}, {"batch_first": True}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True},
    {"kdim": 8, "vdim": 10}, {"kdim": 8, "vdim": 10, "bias": False, "add_bias_kv": True, "batch_first": True},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("weights", [True, False])
def test_it_computes_what_pytorchs_does(options: dict, weights: bool):
    own = randomised(nn.MultiheadAttention(D, HEADS, **options))
    free = copy.deepcopy(own)
    free_heads(free, attentions_of(free))
    assert type(free) is HeadAttention and list(free.state_dict()) == list(own.state_dict())
    first = options.get("batch_first", False)

    def shaped(t: Tensor) -> Tensor:
        return t if first else t.transpose(0, 1)

    q, k = shaped(drawn(N, T, D)), shaped(drawn(N, S, options.get("kdim", D), seed=1))
    v = shaped(drawn(N, S, options.get("vdim", D), seed=2))
    masks = [None, torch.rand(T, S) > 0.6, drawn(T, S), drawn(N * HEADS, T, S), torch.rand(N * HEADS, T, S) > 0.6]
    padding = [None, torch.arange(S).expand(N, S) > 4, drawn(N, S)]
    for mask, left_out, average in product(masks, padding, (True, False)):
        if mask is not None and left_out is not None and mask.dtype != left_out.dtype:
            continue  # PyTorch warns
        if mask is not None and mask.dtype == torch.bool:
            mask[..., 0] = False  # no row without a key
        given = {"key_padding_mask": left_out, "attn_mask": mask, "need_weights": weights,
                 "average_attn_weights": average}  # fmt: skip
        (a, b), (c, d) = own(q, k, v, **given), free(q, k, v, **given)
        assert torch.allclose(a, c, atol=1e-12, rtol=0) and (b is None) == (d is None)
        assert b is None or torch.allclose(b, d, atol=1e-12, rtol=0)
    if not options.get("kdim"):
        causal = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64)
        for left_out in (None, torch.arange(T).expand(N, T) > 3):
            given = {"attn_mask": causal, "is_causal": True, "need_weights": weights, "key_padding_mask": left_out}
            (a, b), (c, d) = own(q, q, q, **given), free(q, q, q, **given)
            assert torch.allclose(a, c, atol=1e-12, rtol=0)
        single = q[0] if first else q[:, 0]
        (a, b), (c, d) = own(single, single, single), free(single, single, single)
        assert torch.allclose(a, c, atol=1e-12, rtol=0) and torch.allclose(b, d, atol=1e-12, rtol=0)
    with pytest.raises(RuntimeError, match="is_causal needs an attn_mask"):
        free(q, k, v, is_causal=True)


class Around(nn.Module):
    """An attention with something on both sides."""

    def __init__(self, **options: object):
        super().__init__()
        self.turn = not options.get("batch_first")
        self.before, self.after = nn.Linear(6, D), nn.Linear(D, 4)
        self.k, self.v = nn.Linear(6, options.get("kdim", D)), nn.Linear(6, options.get("vdim", D))
        self.attention = nn.MultiheadAttention(D, HEADS, **options)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = self.before(x), self.k(y), self.v(y)
        if self.turn:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        out, _ = self.attention(q, k, v)
        return self.after(out + q)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_heads_and_everything_around_are_units(options: dict):
    model = randomised(Around(**options))
    inputs = (drawn(N, T, 6), drawn(N, S, 6, seed=4))
    graph = sc.trace(model, inputs)
    groups = {g.name: g for g in graph.groups}
    own = {"k", "v"} if "kdim" in options else set()  # else one weight reads all three
    assert set(groups) == {"before", "attention"} | own and len(groups["attention"]) == HEADS
    assert all(g.exact for g in graph.groups)
    plan = sc.make_plan(graph, {"before": [0, 7], "attention": [1]} | {name: [1] for name in own})
    small = sc.cut(model, plan)
    assert sc.check(model, small, plan, inputs) < 1e-12
    assert type(small.attention) is HeadAttention and type(model.attention) is nn.MultiheadAttention
    assert (small.attention.num_heads, small.attention.head_dim, small.attention.embed_dim) == (2, 4, 10)
    read = sc.Plan.from_json(plan.to_json())
    assert read == plan and read.attentions == ["attention"]
    again = sc.trace(small, inputs)
    more = sc.make_plan(again, {"attention": [0], "before": [4]})
    assert sc.check(small, sc.cut(small, more), more, inputs) < 1e-12


def test_weights_that_are_returned_keep_all_heads():
    class Tells(Around):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            q = self.before(x)
            out, weights = self.attention(q, q, q)
            return self.after(out), weights

    model = randomised(Tells(batch_first=True))
    inputs = (drawn(N, T, 6), drawn(N, S, 6))
    exact = {g.name: g.exact for g in sc.trace(model, inputs).groups}
    assert exact == {"before": True, "attention": False, "attention.out_proj": True}
    named = sc.trace(model, inputs, outputs=lambda out: out[0])
    assert all(g.exact for g in named.groups)


class Full(nn.Module):
    """Encoder and decoder."""

    def __init__(self, *, norm_first: bool, batch_first: bool):
        super().__init__()
        self.a, self.b = nn.Linear(6, D), nn.Linear(5, D)
        self.net = nn.Transformer(D, HEADS, 2, 2, 16, 0.0, batch_first=batch_first, norm_first=norm_first)
        self.head = nn.Linear(D, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        length = y.shape[1]
        if not self.net.batch_first:
            x, y = x.transpose(0, 1), y.transpose(0, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=y.dtype)
        return self.head(self.net(self.a(x), self.b(y), tgt_mask=mask))


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_encoders_and_decoders(norm_first: bool, batch_first: bool):
    model = randomised(Full(norm_first=norm_first, batch_first=batch_first))
    inputs = (drawn(N, S, 6), drawn(N, T, 5))
    graph = sc.trace(model, inputs)
    heads = [g for g in graph.groups if len(g) == HEADS]
    assert len(heads) == 6 and all(g.exact for g in graph.groups)
    plan = sc.make_plan(graph, {g.name: [len(g) // 2] for g in graph.groups})
    small = sc.cut(model, plan)
    assert sc.check(model, small, plan, inputs) < 1e-10
    for training in (True, False):
        whole = sc.masked(model, plan).train(training)
        assert torch.allclose(whole(*inputs), small.train(training)(*inputs), atol=1e-10, rtol=0)
    small.eval()(*inputs).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())


def encoder(layers: int = 2) -> nn.Module:
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(D, 4, 16, 0.0, batch_first=True)
            self.embed, self.net, self.head = nn.Embedding(30, D), nn.TransformerEncoder(layer, layers), nn.Linear(D, 4)

        def forward(self, ids: Tensor) -> Tensor:
            padding = ids == 0
            hidden = self.net(self.embed(ids), src_key_padding_mask=padding)
            return self.head(hidden.masked_fill(padding[..., None], 0).sum(1))

    return randomised(Encoder())


@pytest.mark.parametrize("layer", [0, 1])
def test_the_fused_kernel_of_pytorch_is_not_taken_by_what_it_does_not_fit(layer: int):
    """With padding, and without gradients, PyTorch's own encoder runs on nested tensors."""
    model, ids = encoder(), torch.tensor([[3, 4, 5, 6, 0, 0], [7, 8, 9, 1, 2, 3]])
    graph = sc.trace(model, ids)
    name = next(g.name for g in graph.groups if len(g) == 4 and f"layers.{layer}.self_attn" in g.name)
    plan = sc.make_plan(graph, {name: [0, 2]})
    small = sc.cut(model, plan)
    with torch.no_grad():
        assert torch.allclose(sc.masked(model, plan)(ids), small(ids), atol=1e-10, rtol=0)
    assert sc.check(model, small, plan, ids) < 1e-10
    # what was not cut goes on as it was
    first = small.net.layers[1 - layer]
    assert type(first.self_attn) is nn.MultiheadAttention and first.activation_relu_or_gelu


def test_saved_loaded_exported(tmp_path):
    model = randomised(Around(batch_first=True))
    inputs = (drawn(N, T, 6), drawn(N, S, 6, seed=4))
    plan = sc.make_plan(sc.trace(model, inputs), {"attention": [0], "before": [2]})
    small = sc.cut(model, plan)
    sc.save(small, tmp_path / "small.safetensors")
    loaded = sc.load(tmp_path / "small.safetensors", lambda: Around(batch_first=True).double())
    assert torch.equal(loaded.eval()(*inputs), small(*inputs))
    program = torch.export.export(small, inputs)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    assert torch.allclose(program.module()(*inputs), small(*inputs), atol=1e-12, rtol=0)


def test_a_subclass_with_a_forward_of_its_own_is_left_alone():
    class Own(nn.MultiheadAttention):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: object) -> tuple:
            return super().forward(query, key, value, **options)

    layer = nn.TransformerEncoderLayer(D, HEADS, 16, batch_first=True, norm_first=True)
    layer.self_attn = Own(D, HEADS, batch_first=True)
    graph = sc.trace(randomised(layer), drawn(N, T, D))
    assert [g.name for g in graph.groups] == ["linear1"]
    assert any(f.axis.startswith("self_attn.") and f.place for f in graph.frozen)
