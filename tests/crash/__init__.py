"""A simulated disk that loses power, and a machine that restarts on the remaining state."""
