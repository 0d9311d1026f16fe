"""A simulated disk that loses power, and a machine that restarts on what is left of it."""
