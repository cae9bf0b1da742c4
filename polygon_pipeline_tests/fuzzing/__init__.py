"""Hostile inputs for every parser: what reads bytes from outside returns a value or raises its documented error.

    make fuzz                                     # every target, a minute each, with a seed of its own
    make fuzz FUZZ="--minutes 10 frames ledgers"

Belongs here: the mutations, the targets, the runner, and `findings/`, the inputs that once broke something: they are
tried again by every test run. Does not belong here: faults of networks, disks and processes.
"""
