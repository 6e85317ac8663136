"""Undoes it: takes a tap away from its bridge, and what a crash left behind."""
