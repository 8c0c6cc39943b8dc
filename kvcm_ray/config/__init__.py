"""The configuration of a manager: what can be set, where values come from, what they mean.

`settings` says what can be set (pydantic), `sources` reads file, environment and flags, `texts` writes
them down for people, `group_form` and `declared` make storages and groups of what is declared. Only the
last two are used by commands and managers that have no pydantic at hand.
"""
