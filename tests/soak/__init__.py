"""A writer that is killed, again and again, beside readers that check every byte: `python -m soak.kills`."""
