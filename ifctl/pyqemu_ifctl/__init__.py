"""Shows and explains: the operator's program."""
