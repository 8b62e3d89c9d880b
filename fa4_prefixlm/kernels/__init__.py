"""Triton kernels: fill a serving plan, gather keys from pages, add the second of two passes. None synchronises."""
