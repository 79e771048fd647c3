"""One suite for every broker: what orchestrator/brokers/base.py and section 5 of the contract promise.

rig.py is what the tests hold in their hands, drivers.py what they need to know of each broker, victim.py a consumer
in a process of its own that can be killed or frozen. A test states one intent and names no broker.
"""
