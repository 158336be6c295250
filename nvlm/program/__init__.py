"""What every program needs: command line, errors, strict JSON and JSON lines."""
