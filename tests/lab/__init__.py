"""The tests' own laboratory: namespaces, taps, switches and QEMUs, all of them real."""
