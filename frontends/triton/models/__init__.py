"""What runs inside the Triton Inference Server."""
