"""Runs samples through each layer and records the largest magnitudes."""
