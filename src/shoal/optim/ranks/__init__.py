"""One peer of several ranks: the processes of one machine that torchrun starts for DistributedDataParallel."""
