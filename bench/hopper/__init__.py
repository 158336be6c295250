"""The product on a Hopper GPU, phase by phase."""
