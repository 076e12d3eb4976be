"""What one gate remembers in files below its data directory.

Why: whoever was refused asks days later, and the operator answers from what is kept here.
Promise: what is here now is bounded and may be lost: the oldest goes when there is no more room, and what a full disk
    does not take is dropped and counted.  It never delays a session and never fails one.
"""

from gatepost.store.refusals import Refusal, Refusals, find, kept_since, reference_of, refusals_directory

__all__ = ["Refusal", "Refusals", "find", "kept_since", "reference_of", "refusals_directory"]
