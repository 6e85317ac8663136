"""What is wrong with this host: one look at it, then checks that judge what was seen."""
