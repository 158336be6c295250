"""Replicas of the HTTP server behind one address: an application of Ray Serve."""
