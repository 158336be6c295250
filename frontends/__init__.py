"""Doors onto runtime/serving."""
