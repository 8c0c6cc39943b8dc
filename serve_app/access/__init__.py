"""Who calls, and what they may do: accounts, tokens, scopes, limits and the audit log of the gateway.

`gate` is what the rest of the gateway calls; `rules` is the table of who may do what; `scope` hides from
a caller what it may not know of.
"""
