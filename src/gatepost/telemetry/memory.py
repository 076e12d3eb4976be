"""Memory that the gate's processes share: made by the supervisor, handed to its children as a file descriptor.

Trust: a child may be taken over by what it parses.  The size is sealed, so that no child can truncate the memory under
    the others (a read beyond its end is SIGBUS); what stands in it is numbers and bounded text, read as such.
Sources: memfd_create(2), fcntl(2) F_ADD_SEALS, mmap(2).
"""

from __future__ import annotations

import fcntl
import mmap
import os


def create_memory(name: str, size_octets: int) -> int:
    """Make zeroed memory without a name in any file system.

    Returns:
        A file descriptor, closed on exec; pages that nobody touches cost nothing.
    """
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size_octets)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return descriptor


def map_memory(descriptor: int, *, writable: bool = True) -> memoryview:
    """The memory behind a descriptor, as octets; it stays mapped as long as the view lives."""
    access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
    return memoryview(mmap.mmap(descriptor, os.fstat(descriptor).st_size, access=access))
