"""Configurations for `--config`, in Scenic's habits; `sparsity` reads their argument."""
