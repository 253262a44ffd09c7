"""A memory of prototypes that is read by association: one step of a modern Hopfield network."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class HopfieldMemory(nn.Module):
    """HF(r) = softmax(beta r X^T) X, with learnable stored patterns X (Ramsauer et al., arXiv 2008.02217).

    Args:
        prototypes: Rows K of X.
        depth: Columns D of X.
        beta: Inverse temperature; the larger, the nearer to the one most similar row.
    """

    def __init__(self, prototypes: int, depth: int, beta: float) -> None:
        super().__init__()
        self.patterns = nn.Parameter(torch.zeros(prototypes, depth))
        self.beta = beta

    def forward(self, query: Tensor) -> Tensor:
        """Retrieve for queries [..., D] what is stored like them, [..., D]."""
        return torch.softmax(self.beta * (query @ self.patterns.T), dim=-1) @ self.patterns
