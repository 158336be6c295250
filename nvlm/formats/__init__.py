"""What lies on disk: every name, shape and file of a checkpoint and of an engine directory."""
