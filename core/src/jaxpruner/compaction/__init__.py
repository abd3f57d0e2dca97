"""Compaction: units that are pruned leave, in any function of JAX."""
