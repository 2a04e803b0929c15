"""Implementation of `attention-zoo gallery`."""
