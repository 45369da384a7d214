"""Twins: modules and functions that stand in for a model's own while it is traced, emitting exact
operators."""
