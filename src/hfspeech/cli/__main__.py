"""`python -m hfspeech.cli`, the same as `hfspeech`."""

import sys

from hfspeech.cli import main

sys.exit(main())
