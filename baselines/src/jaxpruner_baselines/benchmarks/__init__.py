"""Benchmarks of the core: each figure next to what a user would pick instead, in the same run.

jaxpruner-baselines bench            # or: python -m jaxpruner_baselines.benchmarks
"""
