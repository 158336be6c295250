"""The whole path on a CPU."""
