"""An exchange that speaks the vendor's protocol on loopback, with a synthetic market or recorded bars to send.

Belongs here: everything that stands in for the vendor. Does not belong here: anything the project uses on real data,
and any code that reads the protocol: were both sides to share it, a misreading would go unnoticed.
"""
