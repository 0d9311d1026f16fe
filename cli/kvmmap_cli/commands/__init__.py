"""One command a module, named like it; each defines `command`. A new file here is a new command.

At import they need click alone: what takes time to load is loaded when the command runs.
"""
