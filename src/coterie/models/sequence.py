"""Models of sequences: int64 [B, T], character numbers below `outputs`, to logits [B, outputs, T].

Position t of the output scores the character that follows the first t + 1. `outputs`, which the data set
gives, is the size of the vocabulary on both sides; `input_shape` is (T,).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from coterie.core.errors import ConfigError


def char_gru(
    *, input_shape: tuple[int, ...], outputs: int, embedding: int = 8, hidden: int = 128, layers: int = 1
) -> nn.Module:
    """A character-level GRU: 61,897 parameters for 65 characters.

    The stacked character LSTM of McMahan et al. 2017 (arXiv:1602.05629, section 3), which also embeds in 8
    dimensions and is unrolled for 80 characters, made small. Raises ConfigError for an option below 1.
    """
    _check("char_gru", input_shape, outputs=outputs, embedding=embedding, hidden=hidden, layers=layers)
    return CharGRU(outputs, embedding, hidden, layers)


def transformer(
    *, input_shape: tuple[int, ...], outputs: int, layers: int = 2, width: int = 128, heads: int = 4
) -> nn.Module:
    """A decoder-only transformer: 423,745 parameters for 80 of 65 characters.

    The blocks of GPT-2 (Radford et al. 2019): layer norm before attention and before a GELU layer 4 times as
    wide; learned positions; no dropout, weights not shared. Sequences may be shorter than `input_shape`.
    Raises ConfigError for an option below 1 or heads that do not divide the width.
    """
    _check("transformer", input_shape, outputs=outputs, layers=layers, width=width, heads=heads)
    if width % heads:
        raise ConfigError(
            f"transformer(width={width}, heads={heads}): heads must divide the width", "for example 128 and 4"
        )
    return Transformer(input_shape[0], outputs, layers, width, heads)


class CharGRU(nn.Module):
    """Embedding, GRU, linear map to the vocabulary."""

    def __init__(self, vocabulary: int, embedding: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.gru = nn.GRU(embedding, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T] -> [B, vocabulary, T]."""
        outputs, _ = self.gru(self.embedding(x))
        logits: Tensor = self.head(outputs)
        return logits.transpose(1, 2)


class Transformer(nn.Module):
    """Characters and positions embedded, blocks, layer norm, linear map to the vocabulary."""

    def __init__(self, length: int, vocabulary: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T] -> [B, vocabulary, T]."""
        places = torch.arange(x.shape[1], device=x.device)
        logits: Tensor = self.head(self.norm(self.blocks(self.characters(x) + self.positions(places))))
        return logits.transpose(1, 2)


class Block(nn.Module):
    """Attention, then two dense layers, each on the normalised input and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = CausalSelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.dense = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        x = x + self.attention(self.norm1(x))
        dense: Tensor = self.dense(self.norm2(x))
        return x + dense


class CausalSelfAttention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V in each head (Vaswani et al. 2017, arXiv:1706.03762, eq. 1), never ahead.

    The rows of `qkv` give the queries, keys and values of all heads, in this order, as in
    torch.nn.MultiheadAttention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, heads, T, d]
            for part in self.qkv(x).chunk(3, 2)
        )
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


def _check(model: str, input_shape: tuple[int, ...], **sizes: int) -> None:
    if len(input_shape) != 1:
        raise ConfigError(
            f"{model}(input_shape={input_shape}): needs sequences [T] of whole numbers",
            'use a data set of text, such as "shakespeare", or another model',
        )
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{model}({name}={value!r}): needs a whole number >= 1", "for example 2")
