"""The values of the settings that a port may have, one setting a module."""
