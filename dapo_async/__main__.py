"""`python -m dapo_async` is `dapo-async`."""

from dapo_async.cli.main import console

console()
