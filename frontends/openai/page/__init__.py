"""The page at /: its pieces, and the one document that is made of them."""
