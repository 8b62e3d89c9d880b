"""`fa4-prefixlm check`: does a build of FlashAttention-4 compute these masks right?

cases -> run, probes, speed: what one process does with one build
worker: that process, asked over a pipe; pool: starts them and asks
judge:   numbers -> verdicts
session: all of it, or compiling only where there is no GPU; report, command: show it
"""
