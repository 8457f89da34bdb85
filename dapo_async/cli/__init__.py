"""The command line: `dapo-async COMMAND`.

main       finds the command, turns errors into one line and an exit code
arguments  what the commands share: parser, near names, output

One command a file, which parses its arguments, calls a package below and prints:
train, evaluate (`eval`), report, rerun, grade, config.
"""
