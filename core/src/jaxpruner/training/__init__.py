"""One sparse step: the states that training keeps, the projection, and the optax transformations around it."""
