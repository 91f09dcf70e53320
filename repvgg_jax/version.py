"""The package's version, readable without importing its dependencies."""

__version__ = "0.2.0.dev0"
