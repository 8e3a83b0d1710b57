"""A model's folder before anything in it is used: what it holds, and that it fits together.

Whoever made the folder is not trusted (``docs/security.md``): nothing in it is code, nothing in it
leads out of it, and its numbers are compared with each other before memory is taken for them.
"""
