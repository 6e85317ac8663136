"""Makes it so: looks at the live system, plans, applies, and proves."""
