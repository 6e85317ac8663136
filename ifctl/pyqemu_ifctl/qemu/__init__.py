"""QEMU: what its program can do, the ones that run, and the arguments for one that is to."""
