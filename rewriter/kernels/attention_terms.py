"""The terms of an attention's mask and logits, in the one order that every function and op takes them."""

from typing import NamedTuple

import torch


class Terms(NamedTuple):
    """Which keys a query sees, and what its logits are; as ``attention`` documents them.

    The spans are tables of ``rewriter::attention_spans``: which blocks the two vectors of ids leave to visit.
    """

    segments: torch.Tensor | None
    segment_spans: torch.Tensor | None
    key_mask: torch.Tensor | None
    key_spans: torch.Tensor | None
    sinks: torch.Tensor | None
    scale: float
    causal: bool
    window: int
    chunk: int
    softcap: float

    def check(self, queries: int, keys: int) -> None:
        """Raises ValueError where the terms contradict each other or the numbers of queries and keys."""
        window, chunk = self.window, self.chunk
        if window and not self.causal:
            raise ValueError(
                f"attention: window {window} without causal=True has no meaning here; set causal."
            )
        if window < 0 or chunk < 0:
            raise ValueError(f"attention: window {window} and chunk {chunk} must be 0 (none) or positive.")
        square = self.causal or chunk or self.segments is not None
        if square and queries != keys:
            raise ValueError(
                f"attention: {queries} queries and {keys} keys have no common positions; "
                "only key_mask works there."
            )

    def dense_mask(self, queries: int, keys: int, device: torch.device) -> torch.Tensor | None:
        """The mask as one boolean (batch or 1, 1, queries, keys), True where allowed; None without terms."""
        rows = torch.arange(queries, device=device)[:, None]
        columns = torch.arange(keys, device=device)[None, :]
        terms = []
        if self.causal:
            terms.append((columns <= rows)[None, None])
        if self.window:
            terms.append((columns > rows - self.window)[None, None])
        if self.chunk:
            terms.append((columns // self.chunk == rows // self.chunk)[None, None])
        if self.segments is not None:
            terms.append((self.segments[:, :, None] == self.segments[:, None, :])[:, None])
        if self.key_mask is not None:
            terms.append(self.key_mask[:, None, None, :].expand(-1, 1, queries, -1))
        allowed = None
        for term in terms:
            allowed = term if allowed is None else allowed & term
        return allowed


def span_sizes(device: torch.device) -> tuple[int, int]:
    """Tokens to a line of ``attention_spans`` and to a cell, powers of 2.

    Lines as short as the usual block of rows: a longer one, where two documents meet, has a block visit both.
    """
    return (8, 4) if device.type == "cpu" else (64, 32)


def lse_rows(queries: int) -> int:
    """Rows of the log-sum-exp that is saved for so many queries: whole blocks of every kernel."""
    return -(-queries // 128) * 128
