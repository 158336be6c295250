"""Runs engine directories. Needs torch and Pillow alone; never imports `build`."""
