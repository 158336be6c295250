"""Triton Inference Server: a model repository for an engine, and the program that serves it."""
