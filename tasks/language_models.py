"""Language models, each ``model(tokens) -> logits``: GPT-2, an LSTM, T5.

tokens: int64 of shape (batch, length). Logits of shape (batch, n, vocabulary) are of the tokens
that follow the last n: all of them, or the second half for T5, whose encoder reads the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def next_token_loss(model: Callable[[Tensor], Tensor], tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token; targets are the tokens one further on."""
    logits = model(tokens)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets[:, -logits.shape[1] :].flatten())


@dataclass(frozen=True)
class Size:
    """layers, heads and width of a transformer; of T5 on each side. ``hidden``: the width inside.

    Of an LSTM: layers, width of the embedding, hidden units of all layers but the last.
    """

    layers: int
    heads: int
    width: int
    hidden: int


# -- GPT-2 -------------------------------------------------------------------------------------


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): learned positions, normalisation first, head tied to embedding.

    Args:
        size: ``hidden`` is 4 width in GPT-2.
        vocabulary: number of tokens.
        context: most tokens in a row.
        dropout: of embeddings, attention outputs and layers, in [0, 1).
    """

    def __init__(self, size: Size, vocabulary: int, context: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.context = context
        self.tokens = nn.Embedding(vocabulary, size.width)
        self.positions = nn.Embedding(context, size.width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(GPTBlock(size, dropout) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        for name, p in self.named_parameters():
            if p.ndim == 2:  # the sums of 2 layers terms keep their scale
                depth = 2 * size.layers if name.endswith("out.weight") else 1
                nn.init.normal_(p, std=0.02 / math.sqrt(depth))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        if length > self.context:
            raise ValueError(f"{length} tokens in a row, and the model's context is {self.context}")
        place = torch.arange(length, device=tokens.device)
        x = self.drop(self.tokens(tokens) + self.positions(place))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


class GPTBlock(nn.Module):
    def __init__(self, size: Size, dropout: float) -> None:
        super().__init__()
        width = size.width
        self.heads, self.dropout = size.heads, dropout
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inside, self.out = nn.Linear(width, size.hidden), nn.Linear(size.hidden, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(t, self.heads) for t in self.qkv(self.attention_norm(x)).chunk(3, dim=-1))
        dropout = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        x = x + self.drop(self.attention_out(join(seen)))
        return x + self.drop(self.out(F.gelu(self.inside(self.norm(x)), approximate="tanh")))


def split(x: Tensor, heads: int) -> Tensor:
    """(batch, length, heads * d) to (batch, heads, length, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    """The inverse of :func:`split`."""
    return x.transpose(1, 2).flatten(-2)


# -- LSTM --------------------------------------------------------------------------------------


class LSTM(nn.Module):
    """LSTM layers under a head tied to the embedding, sizes as in AWD-LSTM (Merity et al. 2018).

    Plain dropout between layers; AWD's dropped weights and its averaging are left out. Every
    block of tokens begins with the state zero.
    """

    def __init__(self, size: Size, vocabulary: int, context: int, dropout: float = 0.0) -> None:
        super().__init__()
        del context
        self.tokens = nn.Embedding(vocabulary, size.width)
        widths = [size.width, *[size.hidden] * (size.layers - 1), size.width]
        self.layers = nn.ModuleList(
            nn.LSTM(a, b, batch_first=True) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.drop = nn.Dropout(dropout)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        nn.init.uniform_(self.tokens.weight, -0.1, 0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.drop(self.tokens(tokens))
        for layer in self.layers:
            x = self.drop(layer(x)[0])
        return F.linear(x, self.tokens.weight, self.bias)


# -- T5 ----------------------------------------------------------------------------------------


class T5(nn.Module):
    """T5 v1.1 (Raffel et al. 2020) as a prefix language model: the encoder reads the first half
    of the tokens in both directions, the decoder predicts the second half.

    Heads have 64 entries, or width / heads where that is less.
    """

    def __init__(self, size: Size, vocabulary: int, context: int, dropout: float = 0.0) -> None:
        super().__init__()
        del context
        self.tokens = nn.Embedding(vocabulary, size.width)
        self.encoder, self.decoder = T5Stack(size, dropout), T5Stack(size, dropout, causal=True)
        self.head = nn.Linear(size.width, vocabulary, bias=False)
        nn.init.normal_(self.tokens.weight)
        for name, p in self.named_parameters():
            if p.ndim == 2 and "tokens" not in name:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
            if name.endswith("q.weight"):  # in place of the division by sqrt(d) in attention
                p.data *= (p.shape[0] // size.heads) ** -0.5

    def forward(self, tokens: Tensor) -> Tensor:
        first, second = tokens.tensor_split([tokens.shape[1] // 2], dim=1)
        read = self.encoder(self.tokens(first))
        return self.head(self.decoder(self.tokens(second), read))


class T5Stack(nn.Module):
    def __init__(self, size: Size, dropout: float, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.distances = nn.Embedding(BUCKETS, size.heads)
        self.blocks = nn.ModuleList(T5Block(size, dropout, causal) for _ in range(size.layers))
        self.norm, self.drop = RMSNorm(size.width), nn.Dropout(dropout)

    def forward(self, x: Tensor, read: Tensor | None = None) -> Tensor:
        place = torch.arange(x.shape[1], device=x.device)
        distance = place[None, :] - place[:, None]  # from the query to the key
        bias = self.distances(bucket(distance, self.causal)).permute(2, 0, 1)[None]
        if self.causal:
            bias = bias.masked_fill(distance > 0, -math.inf)
        x = self.drop(x)
        for block in self.blocks:
            x = block(x, bias, read)
        return self.drop(self.norm(x))


class T5Block(nn.Module):
    def __init__(self, size: Size, dropout: float, cross: bool) -> None:
        super().__init__()
        width = size.width
        self.attention = T5Attention(size)
        self.cross = T5Attention(size) if cross else None
        self.norm, self.drop = RMSNorm(width), nn.Dropout(dropout)
        self.gate = nn.Linear(width, size.hidden, bias=False)
        self.inside = nn.Linear(width, size.hidden, bias=False)
        self.out = nn.Linear(size.hidden, width, bias=False)

    def forward(self, x: Tensor, bias: Tensor, read: Tensor | None) -> Tensor:
        x = x + self.drop(self.attention(x, None, bias))
        if self.cross is not None:
            x = x + self.drop(self.cross(x, read, None))
        y = self.norm(x)
        gated = F.gelu(self.gate(y), approximate="tanh") * self.inside(y)
        return x + self.drop(self.out(self.drop(gated)))


class T5Attention(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        width, self.heads = size.width, size.heads
        inside = size.heads * min(64, width // size.heads)
        self.norm = RMSNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, inside, bias=False) for _ in range(3))
        self.o = nn.Linear(inside, width, bias=False)

    def forward(self, x: Tensor, read: Tensor | None, bias: Tensor | None) -> Tensor:
        x = self.norm(x)
        read = x if read is None else read
        q, k, v = (split(t, self.heads) for t in (self.q(x), self.k(read), self.v(read)))
        if bias is not None:
            bias = bias.to(q.dtype)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(join(seen))


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * (x * scale.to(x.dtype))


BUCKETS, FARTHEST = 32, 128


def bucket(distance: Tensor, causal: bool) -> Tensor:
    """The bucket of each distance: near ones one by one, far ones in steps of a logarithm."""
    count = BUCKETS if causal else BUCKETS // 2
    back = (-distance).clamp(min=0) if causal else distance.abs()
    near = count // 2
    scale = (count - near) / math.log(FARTHEST / near)
    far = near + (torch.log(back.clamp(min=1) / near) * scale).long()
    chosen = torch.where(back < near, back, far.clamp(max=count - 1))
    return chosen if causal else chosen + count * (distance > 0)


# -- by name -----------------------------------------------------------------------------------

MODELS: dict[str, Callable[..., nn.Module]] = {"gpt": GPT, "lstm": LSTM, "t5": T5}
SIZES: dict[str, dict[str, Size]] = {
    "gpt": {
        "small": Size(2, 4, 64, 256),
        "124m": Size(12, 12, 768, 3072),
        "355m": Size(24, 16, 1024, 4096),
    },
    "lstm": {"small": Size(2, 1, 64, 128), "awd": Size(3, 1, 400, 1150)},
    "t5": {"small": Size(1, 4, 64, 128), "base": Size(12, 12, 768, 2048)},
}


def gpt_size(text: str) -> Size:
    """A decoder's size from "width/layers/heads", such as "768/4/8".

    Raises:
        ValueError: it is not of that form, or the heads do not divide the width.
    """
    try:
        width, layers, heads = map(int, text.split("/"))
        if min(width, layers, heads) < 1 or width % heads:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"{text!r} is no size: give width/layers/heads such as 768/4/8, where the heads divide "
            f"the width"
        ) from None
    return Size(layers, heads, width, 4 * width)
