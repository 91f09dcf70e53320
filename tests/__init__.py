"""Tests, grouped like the library; a package, so that `tests.helpers` is this one wherever Python looks."""
