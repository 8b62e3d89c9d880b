"""What a mask means for a kernel: intervals per row, tiles of queries and keys, and FA4's block lists of them."""
