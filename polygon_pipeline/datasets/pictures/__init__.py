"""The pictures of a day: one module each, made of that day's files, for people.

All are PNGs of at most 50 kB and at most 1,070 pixels wide, which is what Dagster's UI shows them in; their times are
New York's.
"""
