"""The peers, a file for each. None is a dependency; `pip install 'laconic[bench]'` brings them all.

A contestant here is what a user of the peer would run: its own packing, its own kernels, its defaults but for the number of
threads, which is torch's for everybody.
"""
