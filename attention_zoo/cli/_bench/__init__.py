"""Implementation of `attention-zoo bench`."""
