"""The order of the data, packing into rows, batches and prefetching."""
