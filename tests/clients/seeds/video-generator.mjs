// components/VideoGenerator.tsx of the seed `t2m-auth-and-sessions` without React: its state is a
// plain object, and its effect runs until the status is one that ends it. Shorter and smaller than
// the seed's 10 seconds of 1080p.

export class VideoGenerator {
  prompt = "";
  jobId = null;
  status = "idle";
  progress = 0;
  /** Each status that was set, in order. */
  history = [];

  constructor(apiClient) {
    this.apiClient = apiClient;
  }

  setStatus(status) {
    this.status = status;
    this.history.push(status);
  }

  async generateVideo() {
    const { apiClient, prompt } = this;
    try {
      this.setStatus("starting");

      const response = await apiClient.generateVideo(prompt, {
        duration: 1,
        quality: "480p"
      });

      this.jobId = response.data.job_id;
      this.setStatus("processing");
    } catch (error) {
      console.error('Video generation failed:', error);
      this.setStatus("error");
    }
  }

  // Poll for job status
  async poll() {
    const { apiClient, jobId } = this;
    await new Promise((ended) => {
      const pollStatus = async () => {
        try {
          const response = await apiClient.getJobStatus(jobId);
          this.setStatus(response.data.status);
          this.progress = response.data.progress || 0;
        } catch (error) {
          console.error('Status check failed:', error);
        }
        if (!jobId || this.status === "completed" || this.status === "error") {
          clearInterval(interval);
          ended();
        }
      };

      const interval = setInterval(pollStatus, 2000); // Poll every 2 seconds
    });
  }

  /** What the button shows and whether it can be pressed. */
  button() {
    return {
      disabled: !this.prompt || this.status === "processing",
      text: this.status === "processing" ? "Generating..." : "Generate Video",
    };
  }
}
