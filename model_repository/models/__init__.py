"""What runs inside Triton's Python backend: thin layers over `runtime`."""
