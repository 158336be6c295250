"""Limits, bytes and time, and which machine can run what."""
