"""Console, progress line, Weights & Biases, TensorBoard."""
