"""The verifier of mathematical answers. Input: a response and a gold answer. Output: a `Verdict`.

verify       the entry point, in the order of the steps below
extract      which part of a response is its answer
normalize    one spelling for equal answers
numeric      comparison of plain numbers and words, without computer algebra
units        units and currencies beside a number
hedging      texts that do not claim the expression that they end with
size_limits  expressions that are too large to compare
symbolic     comparison by computer algebra, in the worker processes
exactness    equality of values: exact, or close for decimals
pool         the worker processes, with a deadline for each question
worker       the program of a worker process
"""
