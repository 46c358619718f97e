"""Benchmarks of mp_ipcchan beside its peers: ``python -m benchmarks`` from the root of the repository.

``shapes`` says what is sent, ``systems`` how each library sends it, ``harness`` runs the two in child
processes and takes the time; ``cases`` runs what one process can time by itself. ``report`` makes tables and JSON
of it, ``plots`` draws, ``targets`` compares with what is wanted. README.md says how to read them.
"""
