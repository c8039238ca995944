"""Text in, batches out: parquet and token files, tokens, order, rows; knows nothing of models.

order (pure) <- dataset <- loader, which know no kind of file. The two kinds that there are stand
beside them: index <- parquet <- folder, memmap <- tokens. opening picks one, and the tokenizer.
"""

from __future__ import annotations

from data.factory import open_dataset
from data.loading.loader import (
    BatchSpec,
    StepBatch,
    TrainLoader,
    evaluation_rows,
    merge_data_states,
)
from data.loading.packing import document_ids
from data.sources.base import Dataset, DatasetStats

__all__ = [
    "BatchSpec",
    "Dataset",
    "DatasetStats",
    "StepBatch",
    "TrainLoader",
    "document_ids",
    "evaluation_rows",
    "merge_data_states",
    "open_dataset",
]
