"""What the official svix library says of each case.

Reads [{secret, headers, body_b64, now}] from standard input, prints a list of true and false.
"""

import base64
import datetime as real
import json
import sys

import standardwebhooks.webhooks
import svix.webhooks


def at(now):
    """Stops the clock that the libraries read."""

    class Stopped(real.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(now, tz)

    for module in (svix.webhooks, standardwebhooks.webhooks):
        if hasattr(module, "datetime"):
            module.datetime = Stopped


def verdict(case):
    at(case["now"])
    try:
        body = base64.b64decode(case["body_b64"])
        svix.webhooks.Webhook(case["secret"]).verify(body, dict(case["headers"]))
        return True
    except Exception:
        return False


print(json.dumps([verdict(case) for case in json.load(sys.stdin)]))
