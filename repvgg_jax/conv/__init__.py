"""Computation of single convolutions, in deployment and in training; independent of any net."""
