"""What the speed claims rest on: every benchmark runs the project's own code beside what a user would use instead.

`make bench` runs them all, small; see __main__.py. Nothing here is imported by the project or its tests.
"""
