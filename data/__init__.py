"""Text in, batches out: parquet files, tokens, order, rows; knows nothing of models.

order (pure) <- index <- parquet, dataset, packing, feed <- loader; tokenizer and corpus apart.
"""

from __future__ import annotations

from data.dataset import Dataset, Ledger, open_dataset
from data.loader import BatchSpec, StepBatch, TrainLoader, evaluation_rows, merge_cursors
from data.packing import document_ids

__all__ = [
    "BatchSpec",
    "Dataset",
    "Ledger",
    "StepBatch",
    "TrainLoader",
    "document_ids",
    "evaluation_rows",
    "merge_cursors",
    "open_dataset",
]
