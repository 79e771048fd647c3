"""What a person does to a topology: apply and edits, publishing, tailing, tracing, replay, dead letters, checks.

No printing here. What the supervisor answers by itself (status, logs, scale …) the CLI asks it directly.
"""
