// Signs a delivery with the official svix library, as Clerk does. Reads {secret, id, timestamp,
// body} from standard input, prints the three headers.
import { text } from "node:stream/consumers";
import { Webhook } from "svix";

const { secret, id, timestamp, body } = JSON.parse(await text(process.stdin));
const signature = new Webhook(secret).sign(id, new Date(timestamp * 1000), body);
console.log(
  JSON.stringify({
    "svix-id": id,
    "svix-timestamp": String(timestamp),
    "svix-signature": signature,
  }),
);
