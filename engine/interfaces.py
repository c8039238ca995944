"""What a session asks of its text, its batches and its trackers."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from engine.evaluation import DocumentIds


class Text(Protocol):
    """What a run needs of its text besides batches."""

    @property
    def document_ids(self) -> DocumentIds | None:
        """Tells documents apart where tokens may see only their own."""

    @property
    def evaluation(self) -> tuple[tuple[Tensor, ...], ...]:
        """The fixed rows of the training and of the held-out text, in batches."""

    @property
    def bytes_per_token(self) -> float | None:
        """Of the held-out rows; None where tokens stand for no text."""

    def identity(self) -> dict[str, Any]:
        """`data`, which identifies it, and `tokenizer`, which makes text of tokens: plain."""

    def merge_data_states(self, data_states: list[dict[str, Any]]) -> dict[str, Any]:
        """One data state of those of all processes."""


class Tracker(Protocol):
    """Where records go besides metrics.jsonl."""

    def log(self, record: dict[str, Any]) -> None:
        """Sends one record; never raises."""


class Batch(Protocol):
    """The data of one optimizer step."""

    @property
    def micro_batches(self) -> tuple[Tensor, ...]:
        """Rows (B, T+1) of each micro-step."""

    @property
    def epoch(self) -> int:
        """Times the data has been seen whole after this batch."""

    def data_state(self) -> dict[str, Any]:
        """Where the data stands after this batch, as plain values."""

    def describe(self) -> list[str]:
        """The documents of this batch."""
