"""Pruning pretrained networks with a few batches of data."""
