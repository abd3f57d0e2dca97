"""Gin files: `--gin_files=jaxpruner_dopamine/configs/dqn_cartpole.gin` is found wherever the package is."""
