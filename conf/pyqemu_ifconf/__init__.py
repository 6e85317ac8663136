"""What is wanted: the policy's text, read into a Policy, and the Port that a tap shall have.

It reads the policy's own files and is pure otherwise. It imports none of the other packages.
"""
