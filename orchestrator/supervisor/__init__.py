"""Keeps the worker processes as the topology wants them: start, watch, drain, replace.

The supervisor holds no broker connection on its event path; workers are forked from a warm parent.
"""
