// Uploads with the official tus client, which comes again when its connection is cut. Reads
// {endpoint, token, size, chunk_size, with_creation} from standard input; prints what it sent, the
// digest of its bytes, and the id of the file as the server told it.
import { createHash } from "node:crypto";
import { text } from "node:stream/consumers";
import { Upload } from "tus-js-client";

const asked = JSON.parse(await text(process.stdin));
const bytes = Buffer.alloc(asked.size);
for (let at = 0; at < bytes.length; at++) bytes[at] = (at * 31 + (at >> 8) * 17) & 0xff;

const requests = [];
let fileId = null;
const upload = await new Promise((resolve, reject) => {
  const upload = new Upload(bytes, {
    endpoint: asked.endpoint,
    headers: { Authorization: `Bearer ${asked.token}` },
    metadata: { filename: "clip ü.bin", filetype: "video/x-test", purpose: "test" },
    chunkSize: asked.chunk_size ?? Infinity,
    uploadDataDuringCreation: asked.with_creation ?? false,
    retryDelays: [50, 100, 200, 500, 1000, 1000, 1000, 2000, 2000, 2000, 2000, 2000, 2000],
    onAfterResponse(request, response) {
      const offset = response.getHeader("Upload-Offset");
      requests.push({ method: request.getMethod(), status: response.getStatus(), offset });
      fileId = response.getHeader("X-File-Id") ?? fileId;
    },
    onError: reject,
    onSuccess: () => resolve(upload),
  });
  upload.start();
});
const sha256 = createHash("sha256").update(bytes).digest("hex");
console.log(JSON.stringify({ url: upload.url, requests, file_id: fileId, sha256 }));
