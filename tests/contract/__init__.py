"""What every storage has to do: the suite, and a storage of twenty lines that passes it."""
