"""The command line: `dapo-async COMMAND`. One command a file; the work is done in the packages below."""
