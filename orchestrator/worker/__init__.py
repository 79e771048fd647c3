"""What runs inside one worker process: fetch, run, settle. It never names a broker.

main: the process · guardian, control, logs: what the supervisor sees of it · runtime: one agent's work · port: one
subscription · slots: what runs now · attempt: one run · policy (pure): whether it runs again · endings: carries that
out · journal: remembers over a crash · handlers, context: the user's code and what it is given · requests: replies.
"""
