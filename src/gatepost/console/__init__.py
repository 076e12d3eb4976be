"""The console: what an operator sees over HTTP, from a process of its own.

Why: it sums what the workers count and reads the state that the supervisor writes; however busy or broken it is, no
    session waits for it.
Trust: whoever reaches its address may read counts and health; who has a link of `gatepost console` sees the pages.  It
    changes nothing at the gate.
"""
