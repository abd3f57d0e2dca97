"""Gin files: `jaxpruner_t5x/configs/sparse.gin` makes any run sparse, the others are the paper's."""
