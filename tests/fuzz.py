"""How many damaged inputs each reader is given."""

import os

# `make test` gives a tenth of them, `make test-slow` all.
INPUTS = int(os.environ.get("FASTLM_FUZZ_INPUTS", "2000"))
