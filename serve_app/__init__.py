"""The HTTP interface: ``endpoints`` is the table of calls, ``app`` the ASGI application,
``deployment`` runs it under Ray Serve."""
