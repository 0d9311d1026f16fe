"""Where slabs live: memory, a mapped file. A storage knows bytes and lengths, and nothing of quantisation.

`base` says what every storage can do; nothing above this package tells one from another.
"""
