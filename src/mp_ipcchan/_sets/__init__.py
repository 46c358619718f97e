"""Many receivers at once: undecoded messages, sets of receivers, and callbacks."""
