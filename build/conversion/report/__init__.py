"""What quantisation did, as JSON and as a page."""
