"""What NVLM-D computes: configuration, modules and number formats."""
