"""Small helpers that every package may use and that know nothing of the system.

state_clock     an actor's wall clock, split into named states
files           files that appear whole or not at all: the one writer
checkpoint_dir  folders that appear whole or not at all
thread_stack    where a thread of this process is
plugins         functions of the user, named as module:function
"""
