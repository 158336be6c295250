"""Kernels that the decoder and the vision encoder share."""
