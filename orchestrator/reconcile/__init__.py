"""Brings a broker's resources to what the topology asks: observe, plan (pure), execute.

The plan is data with a cause for each operation; the executor carries no decision of its own.
"""
