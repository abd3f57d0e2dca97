"""Pruning networks that are trained already, with a few batches of data."""
