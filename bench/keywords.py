r"""A keyword spotter as a new user has one: a MobileNet-like network with two heads, data, loss and metric of its own.

Nothing here imports secateur. The words are synthetic (no recordings are at hand): twelve of them, each three phones of
formants over a buzz or noise, said by three kinds of speakers at several speeds and pitches, shifted, in noise of 0 to
15 dB. Inputs are log-mel spectrograms [batch, 1, 40, 98]; one head names the word, the other the kind of speaker.

    cd bench
    python keywords.py                       # trains, some minutes; keywords.safetensors, and the test accuracy
    secateur measure keywords:make --weights keywords.safetensors --inputs keywords:one \
        --backend onnxruntime --threads 1
    secateur prune keywords:make --weights keywords.safetensors --data keywords:loader --loss keywords:loss \
        --evaluate keywords:accuracy --budget latency_ms=HALF --budget backend=onnxruntime --threads 1 --finetune 4 \
        --out spotter
    secateur export spotter --build keywords:make --out spotter.onnx
"""

from __future__ import annotations

import functools
import math
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RATE, WORDS, SPEAKERS = 8000, 12, 3
TRAIN, TEST = 4000, 2000
PHONES = torch.tensor(
    [[300, 2300, 1.0], [650, 1100, 1.0], [500, 1800, 1.0], [350, 800, 1.0], [750, 1300, 1.0], [1800, 3200, 0.0],
     [2500, 3600, 0.0], [400, 1500, 1.0]]
)  # fmt: skip
"""Two formants in Hz, and whether the phone is voiced."""


def spoken(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Spectrograms [count, 1, 40, 98] and targets [count, 2]: word and speaker."""
    g = torch.Generator().manual_seed(seed)
    of_word = torch.randint(0, len(PHONES), (WORDS, 3), generator=torch.Generator().manual_seed(7))
    word, speaker = torch.randint(0, WORDS, (count,), generator=g), torch.randint(0, SPEAKERS, (count,), generator=g)
    pitch = torch.tensor([110.0, 200.0, 290.0])[speaker] * (1 + 0.15 * torch.randn(count, generator=g))
    scale = torch.tensor([0.9, 1.05, 1.2])[speaker] * (1 + 0.05 * torch.randn(count, generator=g))
    start = 0.05 + 0.35 * torch.rand(count, generator=g)
    length = 0.11 * (1 + 0.3 * torch.randn(count, 3, generator=g)).clamp(0.5, 1.6)
    t = torch.arange(RATE) / RATE
    buzz = torch.sin(2 * math.pi * pitch[:, None] * t).sign() + 0.3 * torch.randn(count, RATE, generator=g)
    hiss = torch.randn(count, RATE, generator=g)
    window = torch.hann_window(200)

    def spectrum(sound: Tensor) -> Tensor:
        return torch.stft(sound, 256, 80, 200, window, center=False, return_complex=True).abs()

    spectra = spectrum(buzz), spectrum(hiss)
    hz = torch.linspace(0, RATE / 2, spectra[0].shape[1])
    at = (torch.arange(spectra[0].shape[2]) * 80 + 100) / RATE
    sound = torch.zeros_like(spectra[0])
    for place in range(3):
        begin = start + length[:, :place].sum(1)
        inside = (at >= begin[:, None]) & (at < (begin + length[:, place])[:, None])
        formants = PHONES[of_word[word, place]]
        shape = sum(
            torch.exp(-(((hz - scale[:, None] * formants[:, f : f + 1]) / 180) ** 2)) for f in (0, 1)
        )  # fmt: skip
        voiced = formants[:, 2, None, None]
        sound += inside[:, None] * shape[:, :, None] * (voiced * spectra[0] + (1 - voiced) * spectra[1])  # type: ignore[index]
    noise = spectrum(torch.randn(count, RATE, generator=g))
    ratio = 10 ** (-15 * torch.rand(count, generator=g) / 20)
    loud = sound.flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1)
    power = (sound + (ratio * loud)[:, None, None] * noise) ** 2
    mel = torch.linspace(0, 2595 * math.log10(1 + RATE / 2 / 700), 42)
    edges = 700 * (10 ** (mel / 2595) - 1)
    rise = (hz - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - hz) / (edges[2:] - edges[1:-1])[:, None]
    bank = torch.minimum(rise, fall).clamp(min=0)
    features = (bank @ power + 1e-5).log()
    return ((features - features.mean((1, 2), keepdim=True)) / 2)[:, None], torch.stack([word, speaker], 1)


@functools.cache
def data(split: str) -> tuple[Tensor, Tensor]:
    """All of a split; the test set is looked at by :func:`accuracy` alone."""
    return spoken(*{"train": (TRAIN, 1), "test": (TEST, 2)}[split])


class Block(nn.Module):
    """Expand, filter, project."""

    def __init__(self, width: int, stride: int = 1) -> None:
        super().__init__()
        inner = 3 * width
        self.expand, self.bn1 = nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.filter, self.bn2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False), nn.BatchNorm2d(inner)
        self.project, self.bn3 = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Of [batch, width, mel, time]."""
        y = F.hardswish(self.bn1(self.expand(x)))
        y = self.bn3(self.project(F.hardswish(self.bn2(self.filter(y)))))
        return x + y if self.stride == 1 else y


class Spotter(nn.Module):
    """Two heads, by name."""

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, width, (5, 5), 2, 2, bias=False), nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            Block(width), Block(width, 2), Block(width), Block(width), Block(width, 2), Block(width)
        )
        self.word, self.speaker = nn.Linear(width, WORDS), nn.Linear(width, SPEAKERS)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits of spectrograms."""
        x = self.blocks(F.hardswish(self.bn(self.stem(x)))).mean((2, 3))
        return {"word": self.word(x), "speaker": self.speaker(x)}


def make() -> nn.Module:
    """The network."""
    return Spotter()


def loader() -> torch.utils.data.DataLoader:
    """Training batches."""
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data("train")), 64, shuffle=True)


def one() -> Tensor:
    """One spectrogram."""
    return data("train")[0][:1]


def loss(out: dict[str, Tensor], y: Tensor) -> Tensor:
    """Both heads, the words above all."""
    return F.cross_entropy(out["word"], y[:, 0]) + 0.3 * F.cross_entropy(out["speaker"], y[:, 1])


def accuracy(model: nn.Module) -> dict[str, float]:
    """Per cent of the test set, by head."""
    x, y = data("test")
    found = [model(part) for part in x.split(250)]
    heads = {name: torch.cat([part[name] for part in found]).argmax(1) for name in ("word", "speaker")}
    return {name: 100 * float((got == y[:, i]).float().mean()) for i, (name, got) in enumerate(heads.items())}


def main(epochs: int = 8) -> None:
    """Train it."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model, batches = make(), loader()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * len(batches))
    for epoch in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            value = loss(model(x), y)
            value.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}/{epochs}: loss {value.item():.3f}", file=sys.stderr, flush=True)
    save_file(model.state_dict(), "keywords.safetensors")
    model.eval()
    with torch.no_grad():
        print(accuracy(model))


if __name__ == "__main__":
    main()
