"""From published tensors to quantised shards."""
