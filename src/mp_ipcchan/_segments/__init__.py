"""Memory that messages and processes share: segments, and SharedMemory on them."""
