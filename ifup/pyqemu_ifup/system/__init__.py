"""Processes, locks and holders of descriptors: what of the machine is no network."""
