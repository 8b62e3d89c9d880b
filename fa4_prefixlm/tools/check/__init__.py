"""`fa4-prefixlm check`: does a build of FlashAttention-4 compute these masks right?

cases -> run, probes: what one process does with one build, of which judge makes verdicts
workers: those processes, and who asks them; session: a whole check on a GPU
crosscheck: a check without one, which compiles; report, command: show it
"""
