"""Networks that are made for their first tap, and taken away after their last."""
