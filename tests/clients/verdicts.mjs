// What the official svix library says of each case: reads [{secret, headers, body_b64, now}] from
// standard input, prints a list of true and false.
import { text } from "node:stream/consumers";
import { Webhook } from "svix";

const cases = JSON.parse(await text(process.stdin));
const verdicts = cases.map(({ secret, headers, body_b64, now }) => {
  Date.now = () => now * 1000;
  try {
    new Webhook(secret).verify(Buffer.from(body_b64, "base64"), Object.fromEntries(headers));
    return true;
  } catch {
    return false;
  }
});
console.log(JSON.stringify(verdicts));
