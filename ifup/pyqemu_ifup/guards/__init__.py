"""What a guest may send and what it hears: one module for each mechanism that sees to it."""
