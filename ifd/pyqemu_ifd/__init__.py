"""Does it for others: the resident agent, its wire, and its clients."""
