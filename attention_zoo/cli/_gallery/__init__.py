"""Measurements and pages behind `attention-zoo gallery`."""
