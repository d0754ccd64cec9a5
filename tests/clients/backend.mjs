// Calls a Backend API through Clerk's own client and prints what came of it as one line of JSON.
// Usage: node backend.mjs URL SECRET_KEY
import { createClerkClient } from '@clerk/backend';

const [apiUrl, secretKey] = process.argv.slice(2);
const clerk = createClerkClient({ apiUrl, secretKey, telemetry: { disabled: true } });

const publicMetadata = { role: 'admin', featureFlags: { new: true, old: null } };
const updated = await clerk.users.updateUserMetadata('user_sdk', { publicMetadata });
const read = await clerk.users.getUser('user_sdk');
const list = await clerk.users.getUserList({ limit: 500, offset: 1, orderBy: '-created_at' });
const session = await clerk.sessions.revokeSession('sess_sdk');
const missing = await clerk.users.getUser('user_nobody').catch((error) => error.status);
const stranger = createClerkClient({ apiUrl, secretKey: 'sk_test_wrong' });
const unauthorized = await stranger.users.getUser('user_sdk').catch((error) => error.status);

console.log(
  JSON.stringify({
    updated: updated.publicMetadata,
    read: read.publicMetadata,
    listed: list.data.map((user) => user.id),
    total: list.totalCount,
    session: session.status,
    missing,
    unauthorized,
  }),
);
