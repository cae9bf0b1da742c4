"""An exchange that speaks the vendor's protocol on loopback and sends a synthetic market or recorded bars.

Belongs here: everything that simulates the vendor. Does not belong here: anything the project uses with real data, and
any code that reads the protocol: if server and client shared code, a misunderstanding of the protocol would go
unnoticed.
"""
