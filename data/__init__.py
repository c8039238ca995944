"""Text in, batches out: files, tokens, the order of documents, rows. Knows no model.

tokenizers/   text to token ids and back
sources/      parquet and token files as datasets of segments
loading/      the order of segments and documents, lanes, rows, batches, prefetching
preparation/  from raw text to parquet and token files
factory.py    opens the dataset of a config
run_data.py   what a run takes from its dataset
"""

from __future__ import annotations

from data.factory import index_sources, open_dataset
from data.loading.batch_spec import BatchSpec
from data.loading.data_state import merge_data_states
from data.loading.evaluation_rows import evaluation_rows
from data.loading.loader import StepBatch, TrainLoader
from data.sources.dataset import Dataset

__all__ = [
    "BatchSpec",
    "Dataset",
    "StepBatch",
    "TrainLoader",
    "evaluation_rows",
    "merge_data_states",
    "index_sources",
    "open_dataset",
]
