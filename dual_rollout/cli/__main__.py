import sys

from dual_rollout.cli import main

sys.exit(main())
