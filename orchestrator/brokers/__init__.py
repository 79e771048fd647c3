"""How each broker does what every topology needs. One package a broker; none knows of another.

Adapters carry out (wait, count, settle, create); when to retry or give up is decided in worker.policy, and what to
create or delete in reconcile.planner. A client library is imported only inside its own package.
"""
