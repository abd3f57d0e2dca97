"""Compaction removes pruned units from any JAX function."""
