"""Benchmarks of mp_ipcchan beside its peers: ``python -m benchmarks`` from the root of the repository.

``shapes`` says what is sent, ``systems`` how each library sends it, ``harness`` runs the two in child
processes and takes the time, ``report`` makes tables and JSON of it. README.md says how to read them.
"""
