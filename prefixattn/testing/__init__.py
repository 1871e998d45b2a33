"""What tests and benchmarks share. Nothing of the library imports it."""
