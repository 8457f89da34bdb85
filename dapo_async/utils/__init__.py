"""Small helpers that every package may use. They do not depend on other packages.

state_clock     an actor's wall clock, split into named states
files           atomic writes: a file is complete or does not exist
paths           refuses a path that can't be printed in one line
checkpoint_dir  the same for folders
thread_stack    the current line of a thread of this process
hub_faults      errors of the Hugging Face hub with their remedies
lazy            imports modules of a package at the first use of their names
plugins         functions of the user, named as module:function
"""
