"""Makes artefacts: checkpoint directories and engine directories. Never imports `runtime`."""
