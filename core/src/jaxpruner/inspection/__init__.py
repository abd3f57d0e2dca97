"""What a network costs, and whether it is as sparse as it should be, read from jaxprs, parameters and states."""
