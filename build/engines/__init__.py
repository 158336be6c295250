"""Step 2: from a checkpoint directory to an engine directory."""
