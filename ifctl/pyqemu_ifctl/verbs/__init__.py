"""The verbs of pyqemu-ifctl, one a module: its command line, and what it answers."""
