"""Token ids to token ids: continuous batching over a paged KV cache."""
