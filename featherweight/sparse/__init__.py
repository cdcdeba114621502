"""Sparse training: which weights exist."""
