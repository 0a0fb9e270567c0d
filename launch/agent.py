"""Alias of :mod:`bitlm_dist.launch.supervisor` for the batch scripts of earlier versions, which
call it and its commands by their old names.
"""

import sys

from bitlm_dist.launch import supervisor

COMMANDS = {
    "begin": "start-attempt",
    "judge": "check-nodes",
    "decide": "finish-attempt",
    "left_out": "excluded",
}


if __name__ == "__main__":
    sys.argv[1] = COMMANDS[sys.argv[1]]
    supervisor.main()
