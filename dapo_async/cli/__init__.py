"""The command line: `dapo-async COMMAND`.

main       finds the command, turns errors into one line and an exit code
arguments  parser, suggestions for wrong names, and output of all commands

Each command has one file. It parses the arguments, calls a package of a lower level and prints:
train, status, evaluate (`eval`), report, verify, rerun, grade, bench, config.
"""
