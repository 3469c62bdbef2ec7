"""The work that every system is given: models, data and order, as plain torch and NumPy.

This file is imported in every environment, so that all systems run the very same modules. It knows no system.
`prepare.py` writes a work folder, which holds everything that was drawn: initial weights, each client's
examples, the cohort of each round and the order in which each client goes through its examples.
"""

from __future__ import annotations

import gzip
import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

POPULATION = 100  # clients that exist
COHORT = 20  # clients a round
SAMPLES = 100  # of each client
BATCH = 10
STEPS = 80  # characters of a text example
EMBEDDING, HIDDEN = 8, 128  # of the character GRU
WIDTH, HEADS, LAYERS = 128, 4, 2  # of the transformer


def softmax() -> nn.Module:
    """Multinomial logistic regression, 784-10."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def mlp() -> nn.Module:
    """The 2NN of McMahan et al. 2017 (arXiv:1602.05629), 784-200-200-10."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
    )


def convolutional(channels: tuple[int, int], kernel: int, hidden: int) -> nn.Module:
    """Two padded convolutions, each with ReLU and 2x2 max-pool, then two linear layers."""
    first, second = channels
    return nn.Sequential(
        nn.Conv2d(1, first, kernel, padding=kernel // 2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(first, second, kernel, padding=kernel // 2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(second * 49, hidden), nn.ReLU(), nn.Linear(hidden, 10),
    )  # fmt: skip


def cnn() -> nn.Module:
    """conv16-conv32-fc128 with 3x3 kernels."""
    return convolutional((16, 32), 3, 128)


def mcmahan_cnn() -> nn.Module:
    """The CNN of McMahan et al. 2017: 1,663,370 parameters."""
    return convolutional((32, 64), 5, 512)


class CharGRU(nn.Module):
    """Characters [B, T] -> scores of each one's successor [B, V, T]: coterie.models.char_gru."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, EMBEDDING)
        self.gru = nn.GRU(EMBEDDING, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, characters)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.embedding(x))[0]).transpose(1, 2)


class Attention(nn.Module):
    """Causal self-attention: torch's fused kernel; or written out, to count its operations."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, 2)
        )
        if self.fused:
            mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            scores = query @ key.transpose(2, 3) / math.sqrt(WIDTH // HEADS)
            ahead = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            mixed = scores.masked_fill(ahead, -math.inf).softmax(3) @ value
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer layer [B, T, d] -> [B, T, d]."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(WIDTH), Attention(fused), nn.LayerNorm(WIDTH)
        self.dense = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.dense(self.norm2(x))


class Transformer(nn.Module):
    """Characters [B, T] -> scores of each one's successor [B, V, T]: coterie.models.transformer."""

    def __init__(self, characters: int, fused: bool) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(characters, WIDTH), nn.Embedding(STEPS, WIDTH)
        self.blocks = nn.Sequential(*(Block(fused) for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        h = self.blocks(self.characters(x) + self.positions(places))
        return self.head(self.norm(h)).transpose(1, 2)


@dataclass(frozen=True)
class Kind:
    """A model of the table. rounds: in one timed repetition, so that the fastest system takes long enough."""

    build: Callable[..., nn.Module]
    data: str  # "images" or "text"
    lr: float
    rounds: int


MODELS = {
    "softmax": Kind(softmax, "images", 0.1, 20),
    "mlp": Kind(mlp, "images", 0.1, 8),
    "cnn": Kind(cnn, "images", 0.1, 4),
    "mcmahan_cnn": Kind(mcmahan_cnn, "images", 0.05, 2),
    "gru": Kind(CharGRU, "text", 0.5, 2),
    "transformer": Kind(Transformer, "text", 0.1, 1),
}


@dataclass(frozen=True)
class Data:
    """Examples before they are dealt out: x [clients, SAMPLES, ...], and a test batch. classes: of y."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    origin: str


def images(folder: Path | None) -> Data:
    """MNIST's first rows, dealt in their order; Gaussian blobs of the same shape without the files."""
    names = [
        f"{part}-{what}.gz"
        for part in ("train", "t10k")
        for what in ("images-idx3-ubyte", "labels-idx1-ubyte")
    ]
    if folder is None or not all((folder / "mnist" / name).exists() for name in names):
        return _synthetic_images()
    pixels, labels, test_pixels, test_labels = (_idx(folder / "mnist" / name) for name in names)
    count = POPULATION * SAMPLES
    x, test_x = (
        ((torch.from_numpy(raw.copy()).float() / 255 - 0.1307) / 0.3081)[:, None]
        for raw in (pixels[:count], test_pixels[:1000])
    )
    y, test_y = (torch.from_numpy(raw.astype(np.int64)) for raw in (labels[:count], test_labels[:1000]))
    return Data(
        x.unflatten(0, (POPULATION, SAMPLES)),
        y.unflatten(0, (POPULATION, SAMPLES)),
        test_x,
        test_y,
        10,
        "MNIST",
    )


def text(folder: Path | None) -> Data:
    """Tiny-shakespeare: a client is a role, with SAMPLES windows spread evenly over what it says.

    The roles with the most text are the clients; the test batch is of the next ones. Without the file: walks
    of a random Markov chain over as many characters.
    """
    path = folder / "tiny-shakespeare" / "input.txt.gz" if folder is not None else None
    if path is None or not path.exists():
        return _synthetic_text()
    whole = gzip.decompress(path.read_bytes()).decode()
    said: dict[str, list[str]] = defaultdict(list)
    for speech in whole.strip().split("\n\n"):
        role, _, words = speech.strip().partition(":\n")
        if words:
            said[role].append(words)
    number = {character: index for index, character in enumerate(sorted(set(whole)))}
    roles = sorted(("\n".join(parts) for parts in said.values()), key=len, reverse=True)
    coded = [np.array([number[each] for each in role], dtype=np.int64) for role in roles[: POPULATION + 10]]
    windows = np.stack([_windows(role) for role in coded])
    return _as_text(windows, len(number), "tiny-shakespeare, by role")


def _windows(role: np.ndarray) -> np.ndarray:
    starts = np.linspace(0, len(role) - STEPS - 1, SAMPLES).astype(int)
    return np.stack([role[start : start + STEPS + 1] for start in starts])


def _as_text(windows: np.ndarray, characters: int, origin: str) -> Data:
    """windows int64 [POPULATION + a few, SAMPLES, STEPS + 1]."""
    whole = torch.from_numpy(windows)
    x, y = whole[..., :-1].contiguous(), whole[..., 1:].contiguous()
    rest = slice(POPULATION, None)
    return Data(
        x[:POPULATION], y[:POPULATION], x[rest].flatten(0, 1), y[rest].flatten(0, 1), characters, origin
    )


def _synthetic_images() -> Data:
    draw = np.random.default_rng(0)
    centres = draw.standard_normal((10, 1, 28, 28))
    y = draw.integers(10, size=POPULATION * SAMPLES + 1000)
    x = torch.from_numpy((centres[y] / 12 + draw.standard_normal((len(y), 1, 28, 28))).astype(np.float32))
    y, count = torch.from_numpy(y), POPULATION * SAMPLES
    shape = (POPULATION, SAMPLES)
    return Data(
        x[:count].unflatten(0, shape),
        y[:count].unflatten(0, shape),
        x[count:],
        y[count:],
        10,
        "synthetic blobs",
    )


def _synthetic_text() -> Data:
    draw, characters = np.random.default_rng(0), 65
    chances = draw.dirichlet(np.full(characters, 0.05), size=characters).cumsum(1)
    now = draw.integers(characters, size=(POPULATION + 10) * SAMPLES)
    walk = [now]
    for _ in range(STEPS):
        now = np.minimum((chances[now] < draw.random((len(now), 1))).sum(1), characters - 1)
        walk.append(now)
    windows = np.stack(walk, 1).reshape(POPULATION + 10, SAMPLES, STEPS + 1)
    return _as_text(windows.astype(np.int64), characters, "a synthetic Markov chain")


def _idx(path: Path) -> np.ndarray:
    raw = gzip.decompress(path.read_bytes())
    rank = raw[3]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(
        np.frombuffer(raw, ">u4", rank, 4).astype(int)
    )


@dataclass(frozen=True)
class Work:
    """A work folder, read.

    x, y: [POPULATION, SAMPLES, ...]; cohorts: [rounds, COHORT], clients; orders: [rounds, COHORT, SAMPLES],
    rows.
    """

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    cohorts: Tensor
    orders: Tensor
    initial: dict[str, Tensor]
    meta: dict[str, Any]

    @property
    def lr(self) -> float:
        return MODELS[self.meta["model"]].lr

    @property
    def allotments(self) -> list[int]:
        """How many rounds to run at each word of the driver: warm-up, repetitions, one for the end."""
        return list(self.meta["allotments"])

    def module(self, *, fused: bool = True) -> nn.Module:
        """The model with its initial weights. fused: see Attention."""
        made = build(self.meta["model"], self.meta["classes"], fused=fused)
        made.load_state_dict(self.initial)
        return made

    def examples(self, round: int, place: int) -> tuple[Tensor, Tensor]:
        """What the client at this place of the round's cohort trains on, in the order of its batches."""
        client, order = int(self.cohorts[round, place]), self.orders[round, place]
        return self.x[client][order], self.y[client][order]

    def test_loss(self, module: nn.Module) -> float:
        """Mean loss of the test batch, in float32."""
        module.eval()
        with torch.no_grad():
            losses = [
                loss(module(x), y).double() * len(y)
                for x, y in zip(self.test_x.split(500), self.test_y.split(500), strict=True)
            ]
        module.train()
        return float(sum(losses)) / len(self.test_y)  # type: ignore[arg-type]


def build(model: str, classes: int, *, fused: bool = True) -> nn.Module:
    """A model by its name, with weights from torch's global generator."""
    if model == "transformer":
        return Transformer(classes, fused)
    return CharGRU(classes) if model == "gru" else MODELS[model].build()


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over the batch (and positions)."""
    return functional.cross_entropy(outputs, targets)


def epoch(module: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    """What a client does in plain PyTorch: one pass of SGD over its examples; returns the mean loss."""
    total = torch.zeros(())
    for start in range(0, len(y), BATCH):
        optimizer.zero_grad()
        value = loss(module(x[start : start + BATCH]), y[start : start + BATCH])
        value.backward()
        optimizer.step()
        total += value.detach()
    return float(total) / math.ceil(len(y) / BATCH)


TENSORS = ("x", "y", "test_x", "test_y", "cohorts", "orders")


def write(folder: Path, tensors: dict[str, Tensor], initial: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write a work folder: one .npy a tensor, so that processes map it and share its memory."""
    for name in TENSORS:
        np.save(folder / f"{name}.npy", tensors[name].numpy())
    np.savez(folder / "initial.npz", **{name: value.numpy() for name, value in initial.items()})
    (folder / "meta.json").write_text(json.dumps(meta))


def read(folder: Path) -> Work:
    """Read a work folder."""
    tensors = {name: torch.from_numpy(np.load(folder / f"{name}.npy")) for name in TENSORS}
    with np.load(folder / "initial.npz") as stored:
        initial = {name: torch.from_numpy(stored[name]) for name in stored.files}
    return Work(**tensors, initial=initial, meta=json.loads((folder / "meta.json").read_text()))
