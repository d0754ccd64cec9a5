// What the seeds do about a token's end: hooks/useTokenRefresh.ts of `t2m-auth-and-sessions` before
// it, and the snippet "Handle Token Expiration" of `animathic-auth-fix` after it.

const SESSION_CONFIG = {
  // Token refresh threshold
  refreshThreshold: 5 * 60, // Refresh if expires in 5 minutes
};

export async function checkTokenExpiry(getToken) {
  try {
    const token = await getToken({ template: "t2m-api" });
    if (!token) return;

    // Decode JWT to check expiry
    const payload = JSON.parse(atob(token.split('.')[1]));
    const expiryTime = payload.exp * 1000; // Convert to milliseconds
    const currentTime = Date.now();
    const timeUntilExpiry = expiryTime - currentTime;

    // Refresh if token expires within threshold
    if (timeUntilExpiry < SESSION_CONFIG.refreshThreshold * 1000) {
      await getToken({ template: "t2m-api", skipCache: true });
    }
  } catch (error) {
    console.error('Token refresh failed:', error);
  }
}

/** Sends a request; `send` builds it anew, so that a retry carries the new token. */
export async function sendWithRefresh(send, refreshAuthToken) {
  const response = await send();
  if (response.status !== 401) return response;
  const error = await response.json();
  if (error.detail?.requires_refresh) {
    // Token expired, trigger refresh
    await refreshAuthToken();
    // Retry the request
    return send();
  }
  throw new Error(error.message);
}
