"""`python -m dapo_async` is `dapo-async`."""

import sys

from dapo_async.cli import main

sys.exit(main())
