"""The actors of a manager, and the handles that call them.

``engine.GroupEngine`` is what a group actor does, without Ray; ``group``, ``registry`` and ``reclaimer``
put actors around their bodies; ``view`` reads the registry without a call; ``handles`` is for clients.
"""
