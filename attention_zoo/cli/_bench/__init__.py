"""Measurements behind `attention-zoo bench`."""
