"""ACT: the only package that owns client sockets."""
