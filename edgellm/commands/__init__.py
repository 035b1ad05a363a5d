"""One click command per file: `command`. Files import only click and options at the top, the rest in functions."""
