"""What the tests, the benchmarks and `fa4-prefixlm check` share: how to provoke, judge and time attention.

accuracy: the float64 answer and the error of an output. bands: what an error is held to.
pages, poison: keys in pages among NaN, memory that holds NaN. timing: times in rounds. machine, tables: for reports.
"""
