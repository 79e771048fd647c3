"""Speed, as ratios from one interleaved run: ours, the loop one would write by hand, and FastStream.

`make bench BROKER=nats|kafka|redis`. Each contender is one process that handles the same events from the same server;
figures of different runs do not compare.
"""
