"""What converting a checkpoint takes."""
