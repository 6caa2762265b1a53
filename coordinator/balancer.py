"""stub"""

import numpy as np
from warmfront.coordinator.situation import Decision, Policy, Situation


class _Static:
    name = "static"
    every = 8

    def __init__(self):
        self.n = 0

    def observe(self, b, a):
        self.last = b

    def decide(self, s):
        self.n += 1
        e = np.empty((0, 3), np.int64)
        owner = s.owner.copy()
        drops = moves = e
        if not s.homes.all():
            rng = np.random.default_rng(self.n)
            g = len(s.homes) - 1
            res = np.argwhere(s.resident[g])
            out = np.argwhere(~s.resident[g] & ~s.coming[g])
            k = min(8, len(res), len(out))
            if k:
                d = res[rng.permutation(len(res))[:k]]
                m = out[rng.permutation(len(out))[:k]]
                drops = np.column_stack((np.full(k, g), d))
                moves = np.column_stack((np.full(k, g), m))
                home = s.resident[s.homes].argmax(0)
                owner[d[:, 0], d[:, 1]] = home[d[:, 0], d[:, 1]]
        return Decision(owner, drops, moves)


def make_policy(name, long_run, size):
    return _Static()
