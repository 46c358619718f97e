"""The transport moves frames and descriptors; it never sees a Python object that a user sent.

1. ``_frame``    what the bytes of a packet mean (pure)
2. ``unix``      packets over AF_UNIX SOCK_SEQPACKET sockets, the one backend so far
3. ``_carrier``  more descriptors than one packet takes
4. ``_spill``    the unsent rest of a process that ends, as one packet; ``_cargo`` has the descriptors in it
"""
