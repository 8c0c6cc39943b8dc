"""The ``kvcm`` command. `main.main` is the entry point; one module for each family of commands."""
