"""Tests, grouped like the library. A package, so that `tests.helpers` always means the one in this checkout."""
