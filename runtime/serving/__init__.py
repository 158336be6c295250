"""The loop that every question goes through."""
