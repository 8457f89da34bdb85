"""Measures one part of the system on the user's own config, model and hardware (`bench`).

In: a config and what to sweep. Out: rows of figures, each with its repetitions. Called by
`cli/bench.py`. No data set is needed: prompts and groups are made up.

figures         the values of a figure, their median and quartiles, rows, the result and its JSON
about           device, versions, commit and digest of the config
session         warm-up, progress and interrupts around the cells of a subject
compare         two results: ratios, and what got worse
table           rows as lines for the terminal
scenario        what a result tells the planner
made_up         prompts, response lengths and groups without a data set
rollout         subject: decoding and prefill of an engine
sglang_rollout  the same rows of an SGLang server
learner         subject: steps of one learner rank
memory          the peak of memory during a step
loop            subjects: the real loop with one side replaced
replaced        the actors in place of a side
command         checks the input, chooses the subject, prints
"""
