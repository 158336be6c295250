"""Runs engine directories. Never imports `build`."""
