"""One module for each interface of the kernel, program or library that the toolkit drives."""
