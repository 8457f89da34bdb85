"""The verifier of mathematical answers: a response and a gold answer come in, a `Verdict` leaves.

verify       the entry point, in the order of the steps below
extract      which part of a response is its answer
normalize    spellings of one thing made equal
numeric      answers that are plain numbers, without a computer algebra system
units        units and currencies around a number
hedging      responses that claim several answers
size_limits  expressions that would take for ever are refused
symbolic     comparison by computer algebra
pool         processes that compare, with a deadline each
worker       what such a process runs
"""
