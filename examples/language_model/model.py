"""A byte-level language model of about 1 M parameters that learns much in little CPU time.

Each byte is embedded together with the two, three and four bytes that end with it: tables of embeddings
addressed by hashes of these n-grams (Svenstrup et al. 2017, arXiv:1709.03933). They cost no multiplications,
and know at once what a GRU needs long to learn. A GRU follows the text, and a linear layer over its state and
the embedding gives the logits of the next byte.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from data import even_windows

BYTES = 256
HASH_FACTOR = 2654435761  # Knuth's multiplicative hash: 2**32 divided by the golden ratio
HASH_BITS = 32
HASH_MASK = (1 << HASH_BITS) - 1
EVALUATION_BATCH = 64


class ByteModel(nn.Module):
    """:param hidden: size of the GRU's state
    :param embedding: size of the embeddings
    :param table: rows of each table of n-grams; a power of 2
    """

    def __init__(self, hidden: int = 128, embedding: int = 64, table: int = 4096) -> None:
        super().__init__()
        self._table_bits = int(math.log2(table))
        self.bytes = nn.Embedding(BYTES, embedding)
        self.ngrams = nn.ModuleList(nn.Embedding(table, embedding) for _ in range(3))
        self.gru = nn.GRU(embedding, hidden, batch_first=True)
        self.logits = nn.Linear(hidden + embedding, BYTES)
        for module in (self.bytes, *self.ngrams):
            nn.init.normal_(module.weight, std=0.5)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """:param text: bytes, int64 ``(batch, length)``
        :returns: for each position the logits of the byte that follows, ``(batch, length, 256)``
        """
        embedded: torch.Tensor = self.bytes(text)
        key = text
        for distance, table in enumerate(self.ngrams, start=1):
            earlier = nn.functional.pad(text, (distance, 0))[:, :-distance]
            key = key * (BYTES + 1) + earlier + 1
            hashed = (key * HASH_FACTOR & HASH_MASK) >> (HASH_BITS - self._table_bits)
            embedded = embedded + table(hashed)
        states: torch.Tensor = self.gru(embedded)[0]
        logits: torch.Tensor = self.logits(torch.cat([states, embedded], dim=-1))
        return logits


def loss_of(model: nn.Module, text: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the bytes ``following``, in nats."""
    return nn.functional.cross_entropy(model(text).flatten(0, 1), following.flatten())


@torch.no_grad()
def bits_per_byte(model: nn.Module, text: torch.Tensor, windows: int = 512, length: int = 256) -> float:
    """Mean over ``windows`` windows of ``length`` bytes, spread evenly over ``text``; each is read from its
    own beginning.
    """
    inputs, following = even_windows(text, windows, length)
    total = 0.0
    for start in range(0, windows, EVALUATION_BATCH):
        batch = slice(start, start + EVALUATION_BATCH)
        total += float(loss_of(model, inputs[batch], following[batch])) * len(inputs[batch])
    return total / windows / math.log(2)
