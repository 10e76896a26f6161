"""Benchmarks: kernels and whole models, ours against named peers that are installed, alternating in one run.

A *work* is something to compute (a matrix times a vector, a sentence encoder, a step of decoding); a *contestant* is one way
to compute it. Every round runs every contestant of a work once, so that whatever the machine does meanwhile meets all of
them alike, and ratios are of rounds in pairs.

    from laconic.bench.run import run
    record = run(["gemv"], rounds=15)

Importing this package imports nothing else: the command line does so for every command.
"""
