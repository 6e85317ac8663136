"""What a policy says of the networks that are made for their first port, and go with the last."""
