// What the official verifier of @clerk/backend says of tokens: reads {jwks_url, audience, tokens}
// from standard input, prints a claim set or {refused: reason} for each token.
//
// The library fetches its keys from `${apiUrl}/v1/jwks` alone, so a forwarder stands there and hands
// on what the issuer serves at its well-known address, unread.
import { createServer } from "node:http";
import { text } from "node:stream/consumers";
import { verifyToken } from "@clerk/backend";

const { jwks_url, audience, tokens } = JSON.parse(await text(process.stdin));
let fetches = 0;
const forwarder = createServer(async (request, response) => {
  fetches += request.url === "/v1/jwks";
  const keys = await fetch(jwks_url);
  response.writeHead(keys.status, { "content-type": "application/json" });
  response.end(await keys.text());
});
await new Promise((ready) => forwarder.listen(0, "127.0.0.1", ready));
const apiUrl = `http://127.0.0.1:${forwarder.address().port}`;
const verdicts = [];
for (const token of tokens) {
  try {
    verdicts.push(await verifyToken(token, { secretKey: "sk_test_unused", apiUrl, audience }));
  } catch (error) {
    verdicts.push({ refused: error.reason ?? error.message });
  }
}
forwarder.close();
console.log(JSON.stringify({ fetches, verdicts }));
process.exit(0);
