"""Several ranks under an MPI launcher. A single rank opens none of it."""
