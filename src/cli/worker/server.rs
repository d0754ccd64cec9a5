//! The lease protocol (CONTRACT §3) from the worker's side: the only place that knows its paths and
//! fields.

use std::path::Path;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use chrono::{DateTime, Utc};
use futures_util::{StreamExt, stream};
use opentelemetry::propagation::Injector;
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Body, Client, Method, RequestBuilder, Response, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;
use url::Url;
use uuid::Uuid;

use crate::actors::codec::is_request_id;
use crate::config::Secret;
use crate::domain::job::{Kind, Options};
use crate::media::renderer::{Made, MadeFile, Progress};

/// Of a call without a body worth mentioning.
const PATIENCE: Duration = Duration::from_secs(20);
/// The longest silence while bytes go up or down.
const SILENCE: Duration = Duration::from_secs(60);
const CHUNK_BYTES: usize = 256 * 1024;

/// The server, as a worker sees it.
pub struct Server {
    http: Client,
    base: String,
    worker_id: String,
    authorization: HeaderValue,
}

/// Why a call had no effect.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// The job is somebody else's now: nothing of this attempt counts.
    #[error("the lease was lost")]
    LeaseLost,
    /// This worker's token is not one of the server's, or the server has no such route.
    #[error("the server refuses this worker with status {0}")]
    Unwelcome(u16),
    /// The server says that what was sent can never be accepted.
    #[error("the server does not take it (status {0})")]
    Unacceptable(u16),
    /// The same call may succeed later.
    #[error("the server does not answer as it should: {0}")]
    Later(String),
    #[error("using a file of this machine: {0}")]
    Disk(#[from] std::io::Error),
}

/// A job in our hands.
#[derive(Deserialize)]
pub struct Lease {
    pub lease_id: Uuid,
    pub job_id: Uuid,
    pub attempt: u32,
    /// Of the request that the job came from.
    #[serde(default)]
    pub request_id: Option<String>,
    pub expires_at: DateTime<Utc>,
    #[serde(default)]
    pub prompt: String,
    pub options: Options,
    #[serde(default)]
    pub source: Option<Link>,
    /// What can be handed in; the first one is the result itself.
    #[serde(default)]
    pub outputs: Vec<Wanted>,
    #[serde(default)]
    pub api_key: Option<SecretText>,
}

#[derive(Deserialize)]
pub struct Link {
    pub url: String,
}

#[derive(Deserialize)]
pub struct Wanted {
    pub name: String,
}

/// A secret on its way in.
#[derive(Deserialize)]
#[serde(from = "String")]
pub struct SecretText(pub Secret);

impl From<String> for SecretText {
    fn from(text: String) -> Self {
        Self(Secret::from(text))
    }
}

#[derive(Deserialize)]
struct Envelope<T> {
    data: T,
}

/// What the server thinks of our progress.
#[derive(Deserialize)]
pub struct Report {
    pub cancelled: bool,
    #[serde(default)]
    pub expires_at: Option<DateTime<Utc>>,
}

impl Server {
    /// # Errors
    /// The token cannot be sent, or there is no TLS on this machine.
    pub fn new(url: &Url, token: Secret, worker_id: String) -> anyhow::Result<Self> {
        let mut authorization = HeaderValue::try_from(format!("Bearer {}", token.reveal()))?;
        authorization.set_sensitive(true);
        // A redirect would carry the token, or the job's secret, somewhere else.
        let http = Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(PATIENCE)
            .read_timeout(SILENCE)
            .build()?;
        let base = format!("{}/api/v1/worker", url.as_str().trim_end_matches('/'));
        Ok(Self { http, base, worker_id, authorization })
    }

    /// Waits for a job, so long at the most.
    pub async fn lease(&self, kinds: &[Kind], wait: Duration) -> Result<Option<Lease>, Refused> {
        let kinds: Vec<_> = kinds.iter().map(|kind| kind.as_str()).collect();
        let body = json!({ "worker_id": self.worker_id, "kinds": kinds, "wait_s": wait.as_secs() });
        let request = self.request(Method::POST, "lease", None);
        let request = request.json(&body).timeout(wait + PATIENCE);
        let response = sent(request).await?;
        match response.status() {
            StatusCode::NO_CONTENT => Ok(None),
            _ => data(response).await.map(Some),
        }
    }

    pub async fn progress(&self, lease: &Lease, progress: &Progress) -> Result<Report, Refused> {
        let message = progress.message.as_deref().filter(|message| !message.is_empty());
        let body = json!({
            "lease_id": lease.lease_id, "progress": progress.percent, "message": message,
        });
        data(sent(self.about(lease, "progress").json(&body).timeout(PATIENCE)).await?).await
    }

    /// Fetches what the job works on.
    pub async fn download(
        &self,
        lease: &Lease,
        link: &Link,
        path: &Path,
        most: u64,
    ) -> Result<(), Refused> {
        // The link is its own permission: our token is not for whoever serves it.
        let request = self.http.get(&link.url).headers(whence(Some(lease)));
        let response = sent(request).await?;
        let mut file = tokio::fs::File::create(path).await?;
        let (mut chunks, mut size) = (response.bytes_stream(), 0u64);
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(later)?;
            size += chunk.len() as u64;
            if size > most {
                return Err(Refused::Unacceptable(StatusCode::PAYLOAD_TOO_LARGE.as_u16()));
            }
            file.write_all(&chunk).await?;
        }
        Ok(file.flush().await?)
    }

    /// Streams a file up, with its digest, under the name that the lease gives it.
    pub async fn hand_in(&self, lease: &Lease, name: &str, made: &MadeFile) -> Result<(), Refused> {
        let (size, digest) = digest(&made.path).await?;
        let file = tokio::fs::File::open(&made.path).await?;
        let name: String = url::form_urlencoded::byte_serialize(name.as_bytes()).collect();
        let path = format!("jobs/{}/output?lease_id={}&name={name}", lease.job_id, lease.lease_id);
        let request = self
            .request(Method::PUT, &path, Some(lease))
            .header(CONTENT_TYPE, &made.content_type)
            .header(CONTENT_LENGTH, size)
            .header("content-digest", format!("sha-256=:{}:", STANDARD.encode(digest)))
            .body(Body::wrap_stream(chunks(file)));
        sent(request).await.map(drop)
    }

    pub async fn complete(&self, lease: &Lease, made: &Made) -> Result<(), Refused> {
        let body = json!({
            "lease_id": lease.lease_id,
            "duration": made.duration, "width": made.width, "height": made.height,
        });
        sent(self.about(lease, "complete").json(&body).timeout(PATIENCE)).await.map(drop)
    }

    pub async fn fail(&self, lease: &Lease, error: &str, retryable: bool) -> Result<(), Refused> {
        let error: String = error.chars().take(1000).collect();
        let body = json!({ "lease_id": lease.lease_id, "error": error, "retryable": retryable });
        self.end(lease, &body).await
    }

    /// Ends a job that was cancelled. It bears no request id: the server knows whose word it was.
    pub async fn cancelled(&self, lease: &Lease) -> Result<(), Refused> {
        let path = format!("jobs/{}/fail", lease.job_id);
        let body = json!({ "lease_id": lease.lease_id, "error": "cancelled", "retryable": false });
        let request = self.request(Method::POST, &path, None).json(&body);
        sent(request.timeout(PATIENCE)).await.map(drop)
    }

    /// The job goes on with the next worker at once. To a server that does not know of this, it is an
    /// attempt that failed.
    pub async fn give_back(&self, lease: &Lease, why: &str) -> Result<(), Refused> {
        let body = json!({ "lease_id": lease.lease_id, "error": why, "given_back": true });
        self.end(lease, &body).await
    }

    async fn end(&self, lease: &Lease, body: &Value) -> Result<(), Refused> {
        sent(self.about(lease, "fail").json(body).timeout(PATIENCE)).await.map(drop)
    }

    fn about(&self, lease: &Lease, what: &str) -> RequestBuilder {
        self.request(Method::POST, &format!("jobs/{}/{what}", lease.job_id), Some(lease))
    }

    fn request(&self, method: Method, path: &str, under: Option<&Lease>) -> RequestBuilder {
        let request = self.http.request(method, format!("{}/{path}", self.base));
        request.header("authorization", self.authorization.clone()).headers(whence(under))
    }
}

/// What a call is a part of: the request that the lease's job came from, if its id is one that a
/// server takes, and the trace that is under way (W3C Trace Context), if there is a collector.
fn whence(under: Option<&Lease>) -> HeaderMap {
    let mut headers = Headers(HeaderMap::new());
    let request_id = under.and_then(|lease| lease.request_id.as_deref());
    if let Some(id) = request_id.filter(|id| is_request_id(id.as_bytes())) {
        headers.set("x-request-id", id.to_owned());
    }
    let context = Span::current().context();
    opentelemetry::global::get_text_map_propagator(|propagator| {
        propagator.inject_context(&context, &mut headers);
    });
    headers.0
}

struct Headers(HeaderMap);

impl Injector for Headers {
    /// What cannot stand in a header is left out.
    fn set(&mut self, name: &str, value: String) {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
            self.0.insert(name, value);
        }
    }
}

/// The answer, if it is a success.
async fn sent(request: RequestBuilder) -> Result<Response, Refused> {
    let response = request.send().await.map_err(later)?;
    let status = response.status();
    match status {
        status if status.is_success() => Ok(response),
        StatusCode::CONFLICT => Err(Refused::LeaseLost),
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => {
            Err(Refused::Later(format!("status {status}")))
        }
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            Err(Refused::Unwelcome(status.as_u16()))
        }
        status if status.is_client_error() => Err(Refused::Unacceptable(status.as_u16())),
        status => Err(Refused::Later(format!("status {status}"))),
    }
}

async fn data<T: serde::de::DeserializeOwned>(response: Response) -> Result<T, Refused> {
    let bytes = response.bytes().await.map_err(later)?;
    // Not the reason: it may quote what was sent, secrets among it.
    let unclear = |_| Refused::Later("its answer cannot be understood".to_owned());
    let value: Value = serde_json::from_slice(&bytes).map_err(unclear)?;
    serde_json::from_value::<Envelope<T>>(value).map_err(unclear).map(|answer| answer.data)
}

/// Without the address: a link in it is a permission.
fn later(error: reqwest::Error) -> Refused {
    let error = error.without_url();
    let cause = std::error::Error::source(&error).map(|cause| format!(" ({cause})"));
    Refused::Later(format!("{error}{}", cause.unwrap_or_default()))
}

async fn digest(path: &Path) -> std::io::Result<(u64, Vec<u8>)> {
    let mut file = tokio::fs::File::open(path).await?;
    let (mut hasher, mut size, mut chunk) = (Sha256::new(), 0, vec![0; CHUNK_BYTES]);
    loop {
        let read = file.read(&mut chunk).await?;
        if read == 0 {
            return Ok((size, hasher.finalize().to_vec()));
        }
        size += read as u64;
        hasher.update(&chunk[..read]);
    }
}

fn chunks(
    file: tokio::fs::File,
) -> impl stream::Stream<Item = std::io::Result<Vec<u8>>> + Send + 'static {
    stream::try_unfold(file, |mut file| async move {
        let mut chunk = vec![0; CHUNK_BYTES];
        let read = file.read(&mut chunk).await?;
        chunk.truncate(read);
        Ok((read > 0).then_some((chunk, file)))
    })
}
