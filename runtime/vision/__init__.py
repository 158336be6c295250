"""Tiles to image embeddings, by whatever executor the engine directory names."""
