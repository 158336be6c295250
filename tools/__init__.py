"""Makers of checkpoints and data; run them as `python -m tools.<name>` from the root."""
