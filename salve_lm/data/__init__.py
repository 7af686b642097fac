"""Data modules of the core."""
