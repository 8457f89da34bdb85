"""The actors as the driver sees them.

handle     one actor; every call has a deadline
learner    all learner ranks as one
evaluator  the evaluator
"""
