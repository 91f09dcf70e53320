"""Compiled inference for the deploy form, and the plans that choose each layer's algorithm."""
