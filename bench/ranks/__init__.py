"""Tensor parallel ranks, on CPUs and on GPUs."""
