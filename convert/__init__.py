"""Conversion of weight files, quantisation, and export to other runtimes."""
