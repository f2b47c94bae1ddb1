"""Long links on one machine: network namespaces whose links a program carries, with delay, loss and rates.

The kernel's own emulator (netem) is a module that many kernels of the cloud lack, and it loses whole bundles of
segments that senders hand over as one. So :mod:`.emulator` carries the packets: it needs root and ``/dev/net/tun``
only, and draws the loss of each segment.
"""
