"""Measures what one up and one down cost, beside what people use instead."""
