"""Where events go, without ever holding up the frame loop.

What is on this machine is a sink behind a bounded queue; what is on the network is a destination that reads from the
event store, and so misses nothing while it cannot be reached.
"""
