"""Has threads that wait for one another sleep, unless the user said how they wait: imported before torch, which reads
the environment once.

Threads that spin hold cores which nodes, workers and other audits want: on a busy machine an audit took two to eight
times its own work.
"""

import os

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
