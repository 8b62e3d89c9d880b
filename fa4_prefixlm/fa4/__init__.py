"""The one place that knows FlashAttention-4: the builds at hand, what each can do, defects and workarounds.

Nothing here imports cutlass until a kernel is launched or compiled.
"""
