"""One click command a file: `command`. At the top a file imports click and options; the rest inside the function."""
