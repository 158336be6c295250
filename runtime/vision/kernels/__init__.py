"""The steps of a vision layer as fused kernels: Triton on a GPU, plain torch everywhere else.

`plain_forms` and `triton_forms` hold the same functions; the first are the second's oracle.
"""
