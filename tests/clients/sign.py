"""Signs a delivery with the official svix library, as Clerk does.

Reads {secret, id, timestamp, body} from standard input, prints the three headers.
"""

import json
import sys
from datetime import datetime, timezone

from svix.webhooks import Webhook

given = json.load(sys.stdin)
at = datetime.fromtimestamp(given["timestamp"], timezone.utc)
signature = Webhook(given["secret"]).sign(given["id"], at, given["body"])
print(
    json.dumps(
        {
            "svix-id": given["id"],
            "svix-timestamp": str(given["timestamp"]),
            "svix-signature": signature,
        }
    )
)
