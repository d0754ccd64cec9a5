// components/VideoPlayer.tsx of the seed `t2m-auth-and-sessions` without React; the element's `src`
// is what it gives.

export async function getSignedUrl(apiClient, jobId) {
  let signedUrl = null;
  let error = null;
  try {
    // Get signed URL for video
    const response = await apiClient.request(`/videos/${jobId}/signed-url`, {
      method: 'POST',
      body: JSON.stringify({ expiresIn: 3600 }) // 1 hour
    });

    signedUrl = response.data.url;
  } catch (err) {
    error = err instanceof Error ? err.message : 'Failed to load video';
  }
  return { signedUrl, error };
}
