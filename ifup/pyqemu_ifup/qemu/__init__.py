"""The QEMU that calls: its command line, and what it says of the guest."""
