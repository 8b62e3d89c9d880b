"""The one place that knows FlashAttention-4: which build is installed, what it can do, its defects and their cures.

Nothing here imports cutlass until a kernel is launched or compiled.
"""
