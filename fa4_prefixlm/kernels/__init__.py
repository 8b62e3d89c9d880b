"""Triton kernels that fill a plan and gather its keys without waiting for the device; they import triton."""
