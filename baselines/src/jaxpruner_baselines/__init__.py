"""Baselines of JaxPruner: small trainings on real data, and the benchmarks of the core."""
