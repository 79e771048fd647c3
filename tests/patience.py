"""How long the tests wait for what must come."""

#: Seconds for what takes milliseconds, or a few seconds when servers start: only a broken promise runs into it, not a
#: machine several times slower or busier than usual. A test whose subject is a shorter time says so and why.
PATIENCE = 60.0
