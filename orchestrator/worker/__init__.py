"""What runs inside one worker process: fetch, run, settle. It never names a broker.

policy decides (pure), runtime drives, handlers call the user's code, journal remembers over a crash.
"""
