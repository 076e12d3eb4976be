"""What an operator asks, answered as objects: why was it refused, who may send, who sent this.

Why: a command, its ``--json`` and the console must not answer differently, so there is one answer, made here.
Trust: questions may be copied from mail, and are parsed as hostile text; whoever shows an answer shows what it quotes
    as text.
Promise: an answer is made of JSON's own types.  Nothing here prints, and nothing changes the gate.
"""
