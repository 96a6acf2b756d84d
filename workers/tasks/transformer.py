"""A decoder-only transformer; imports torch, so it is imported by what needs it."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Causal attention and a perceptron, each behind a layer norm and beside a skip."""

    def __init__(self, width: int, heads: int, head: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * heads * head, bias=False)
        self.out = nn.Linear(heads * head, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        """``[b, L, width]`` to the same."""
        b, length, _ = h.shape
        q, k, v = self.qkv(self.before(h)).view(b, length, 3, self.heads, -1).unbind(2)
        mixed = functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        h = h + self.out(mixed.transpose(1, 2).reshape(b, length, -1))
        inner: Tensor = self.down(functional.gelu(self.up(self.between(h))))
        return h + inner


class Transformer(nn.Module):
    """Tokens in, logits of the next one out; the embedding is used at both ends.

    Args:
        vocabulary, length: of tokens, and most of them in a row.
        layers, width, heads, head: blocks, their width, attention heads and the size of one.
        seed: of the parameters: N(0, 0.02), narrower where layers add up.
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        layers: int,
        width: int,
        heads: int,
        head: int,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.empty(length, width))
        self.blocks = nn.ModuleList(Block(width, heads, head) for _ in range(layers))
        self.last = nn.LayerNorm(width)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            adds_up = name.endswith(("out.weight", "down.weight"))
            deep = (2 * layers) ** -0.5 if adds_up else 1.0
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02 * deep, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[b, L]`` to logits ``[b, L, vocabulary]``."""
        h = self.tokens(tokens) + self.places[: tokens.shape[1]]
        for block in self.blocks:
            h = block(h)
        return functional.linear(self.last(h), self.tokens.weight)


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, in nats a token."""
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten())
