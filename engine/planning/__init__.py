"""What a run will cost: memory, time, and trials before training."""
