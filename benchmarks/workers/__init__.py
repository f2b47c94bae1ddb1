"""Programs that do the work of one side. They run in the environment of that side, which may have few packages.

Each is a process of its own, speaks as :mod:`.protocol` says, and needs torch and psutil besides the side's library.
"""
