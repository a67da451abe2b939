"""A small GPT over bytes: a decoder-only transformer, small enough for two processor cores."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from lastgood.cli._demo.protocol import ModelShape

_BYTES = 256
_DROPOUT = 0.1


class Block(nn.Module):
    """Attention to what came before, then a perceptron; each adds to the stream that passes through."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(_DROPOUT)

    def forward(self, stream: Tensor) -> Tensor:
        stream = stream + self.dropout(self.attend(self.attention_norm(stream)))
        stream = stream + self.dropout(self.perceptron(stream))
        return stream

    def attend(self, stream: Tensor) -> Tensor:
        batch, length, width = stream.shape
        split = self.query_key_value(stream).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.attention_out(seen.transpose(1, 2).reshape(batch, length, width))
        return out


class GPT(nn.Module):
    """Predicts the next byte at every place. The embedding and the output layer share one weight."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(_BYTES, shape.width)
        self.place_embedding = nn.Embedding(shape.context, shape.width)
        self.dropout = nn.Dropout(_DROPOUT)
        self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, _BYTES, bias=False)
        for embedding in (self.token_embedding, self.place_embedding):
            nn.init.normal_(embedding.weight, std=0.02)
        self.head.weight = self.token_embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1])
        stream = self.dropout(self.token_embedding(tokens) + self.place_embedding(places))
        logits: Tensor = self.head(self.norm(self.blocks(stream)))
        return logits
