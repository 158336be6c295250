"""The decoder's network on one device: plain torch and the fast path for Hopper."""
