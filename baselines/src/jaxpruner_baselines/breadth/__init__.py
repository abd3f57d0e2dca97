"""Breadth: what compaction does with many architectures, from bare functions to stock models of hosts.

jaxpruner-baselines breadth
"""
