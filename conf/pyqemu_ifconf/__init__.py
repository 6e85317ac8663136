"""What is wanted: the policy's text, read into a Policy, and the Port that a tap shall have.

Pure but for reading the policy's own files; imports none of the other packages.
"""
