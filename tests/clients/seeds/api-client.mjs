// lib/api-client.ts of the seed `t2m-auth-and-sessions`, without its types and its React hook.

export class ApiClient {
  baseUrl;
  getToken;

  constructor(baseUrl, getToken) {
    this.baseUrl = baseUrl;
    this.getToken = getToken;
  }

  async request(endpoint, options = {}) {
    const token = await this.getToken();

    const config = {
      ...options,
      headers: {
        'Content-Type': 'application/json',
        ...(token && { 'Authorization': `Bearer ${token}` }),
        ...options.headers,
      },
    };

    const response = await fetch(`${this.baseUrl}${endpoint}`, config);

    if (!response.ok) {
      const error = await response.json();
      throw new Error(error.message || 'API request failed');
    }

    return response.json();
  }

  // File operations
  async uploadFile(file, metadata) {
    const formData = new FormData();
    formData.append('file', file);
    if (metadata) {
      Object.entries(metadata).forEach(([key, value]) => {
        formData.append(key, value);
      });
    }

    const token = await this.getToken();
    return fetch(`${this.baseUrl}/files/upload`, {
      method: 'POST',
      headers: {
        ...(token && { 'Authorization': `Bearer ${token}` })
      },
      body: formData
    }).then(res => res.json());
  }

  async getFiles(params) {
    const query = params ? `?${new URLSearchParams(params)}` : '';
    return this.request(`/files${query}`);
  }

  // Video operations
  async generateVideo(prompt, options) {
    return this.request('/videos/generate', {
      method: 'POST',
      body: JSON.stringify({ prompt, ...options })
    });
  }

  async getJobStatus(jobId) {
    return this.request(`/jobs/${jobId}`);
  }
}
