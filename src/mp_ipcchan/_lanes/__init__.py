"""Many channels over one socket: Mux, and its lanes, which stand where links do."""
