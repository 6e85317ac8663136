"""The networks that are made for their first port, and go with their last: what each may say."""
