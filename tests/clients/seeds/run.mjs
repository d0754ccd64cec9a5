// The seeds' front end from sign-in to the player. Reads {base_url, expired, fresh} from standard
// input: tokens of one user. Prints what the pages would show.
import { File } from "node:buffer";
import { text } from "node:stream/consumers";
import { ApiClient } from "./api-client.mjs";
import { checkTokenExpiry, sendWithRefresh } from "./token-refresh.mjs";
import { VideoGenerator } from "./video-generator.mjs";
import { getSignedUrl } from "./video-player.mjs";

const { base_url, expired, fresh } = JSON.parse(await text(process.stdin));
const shown = {};

// Clerk's getToken: the cached token, or a new one when it is asked to skip the cache.
let cached = expired;
let renewals = 0;
const getToken = async ({ skipCache } = {}) => {
  if (skipCache) {
    renewals += 1;
    cached = fresh;
  }
  return cached;
};
const apiClient = new ApiClient(base_url, () => getToken({ template: "t2m-api" }));

// An expired token: the client's error, then the refresh path.
shown.expired_error = await apiClient.getFiles().then(String, (error) => error.message);
const response = await sendWithRefresh(
  async () =>
    fetch(`${base_url}/me`, { headers: { 'Authorization': `Bearer ${await getToken()}` } }),
  () => getToken({ skipCache: true }),
);
shown.after_refresh = { status: response.status, renewals };

// The monitor renews a token that is about to end, and leaves a fresh one alone.
await checkTokenExpiry(getToken);
shown.renewals_of_a_fresh_token = renewals - 1;
cached = expired;
await checkTokenExpiry(getToken);
shown.renewals_of_an_old_token = renewals - 1;

// components/FileUpload.tsx and the list.
const file = new File(["hello"], "notes.txt", { type: "text/plain" });
shown.upload = await apiClient.uploadFile(file, { purpose: "seed" });
shown.files = await apiClient.getFiles({ limit: 10 });

const generator = new VideoGenerator(apiClient);
generator.prompt = "a lighthouse at dusk";
shown.button_before = generator.button();
await generator.generateVideo();
shown.button_while = generator.button();
shown.early_player = await getSignedUrl(apiClient, generator.jobId);
await generator.poll();
shown.button_after = generator.button();
shown.history = generator.history;
shown.progress = generator.progress;

const { signedUrl, error } = await getSignedUrl(apiClient, generator.jobId);
shown.player_error = error;
// As the video element asks: no token, and a range.
const video = await fetch(signedUrl, { headers: { 'Range': 'bytes=0-' } });
const bytes = new Uint8Array(await video.arrayBuffer());
shown.video = {
  status: video.status,
  type: video.headers.get("content-type"),
  disposition: video.headers.get("content-disposition"),
  size: bytes.length,
  brand: new TextDecoder().decode(bytes.slice(4, 8)),
};

shown.empty_prompt = await apiClient.generateVideo("").then(String, (error) => error.message);
shown.missing_job = await apiClient
  .getJobStatus("00000000-0000-7000-8000-000000000000")
  .then(String, (error) => error.message);
console.log(JSON.stringify(shown));
