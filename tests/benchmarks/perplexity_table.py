"""Perplexities side by side, in Markdown: each candidate's, and how far it is from the first one's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


class PerplexityTable:
    """Prints its head at once, and each row when it is known."""

    def __init__(
        self, windows: Sequence[Sequence[int] | npt.NDArray[Any]], candidate: str, first: str
    ) -> None:
        """
        Args:
            windows: of the text, in token ids; the first of each is not predicted.
            candidate, first: what the rows are, and what the first of them is.
        """
        print(f"{sum(len(window) - 1 for window in windows)} tokens\n")
        print(f"| {candidate} | perplexity | to {first} | standard error | seconds |")
        print("|---|---|---|---|---|", flush=True)
        self._exact: npt.NDArray[np.float64] | None = None

    @property
    def is_empty(self) -> bool:
        return self._exact is None

    def add(self, name: str, losses: npt.NDArray[np.float64], seconds: float) -> None:
        """A row. ``losses`` are the nats of each predicted token, in the order of the text."""
        if self._exact is None:
            self._exact = losses
        difference = losses - self._exact
        error = difference.std() / np.sqrt(len(difference))
        print(
            f"| {name} | {np.exp(losses.mean()):.4f} | {np.expm1(difference.mean()):+.2%} | {error:.2%} "
            f"| {seconds:.1f} |",
            flush=True,
        )
