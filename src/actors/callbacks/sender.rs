//! One attempt at a callback: a signed POST in the form of Standard Webhooks, to an address that is
//! allowed, with little patience.

use std::error::Error as StdError;
use std::net::SocketAddr;
use std::time::Duration;

use chrono::{DateTime, Utc};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::header::RETRY_AFTER;
use reqwest::redirect::Policy;
use reqwest::{Client, Response};

use super::address::{self, is_public};
use super::record::Trouble;
use crate::actors::codec::is_request_id;
use crate::clerk::webhook;
use crate::config::Secret;

/// How long an attempt may take, from the look-up of the name to the answer.
const PATIENCE: Duration = Duration::from_secs(15);
/// Nobody reads the answer: so much of it is taken in, in bytes, so that the other side can finish.
const LARGEST_ANSWER: usize = 4 * 1024;

/// Makes the requests.
pub struct Sender {
    client: Client,
    secrets: Vec<Secret>,
    allow_private: bool,
}

/// What is sent.
pub struct Message<'a> {
    pub url: &'a str,
    /// The same at every attempt.
    pub id: &'a str,
    /// Of the request that brought about what is told.
    pub request_id: Option<&'a str>,
    pub at: DateTime<Utc>,
    pub body: Vec<u8>,
}

/// What came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Of the answer, if one came.
    pub status: Result<u16, Trouble>,
    /// What the other side asks for.
    pub retry_after: Option<Duration>,
}

impl Sender {
    /// `secrets` are `whsec_…`, comma separated, and well-formed.
    ///
    /// # Errors
    /// The client cannot be made.
    pub fn new(secrets: &Secret, allow_private: bool) -> reqwest::Result<Self> {
        let secrets = secrets.reveal().split(',').map(|secret| secret.trim().to_owned().into());
        let client = Client::builder()
            .timeout(PATIENCE)
            .redirect(Policy::none())
            // A proxy would look the name up for itself.
            .no_proxy()
            .dns_resolver(Gate { allow_private })
            // The next attempt is long after this one.
            .pool_max_idle_per_host(0)
            .user_agent(concat!("t2m-callbacks/", env!("CARGO_PKG_VERSION")))
            .build()?;
        Ok(Self { client, secrets: secrets.collect(), allow_private })
    }

    /// Sends it once.
    pub async fn send(&self, message: Message<'_>) -> Answer {
        match self.post(message).await {
            Ok(response) => {
                let status = response.status().as_u16();
                let retry_after = retry_after(&response);
                take_in(response).await;
                Answer { status: Ok(status), retry_after }
            }
            Err(trouble) => Answer { status: Err(trouble), retry_after: None },
        }
    }

    async fn post(&self, message: Message<'_>) -> Result<Response, Trouble> {
        // No resolver is asked about an address that is written out, and the setting may be
        // another now than when the job was asked for.
        let url = address::check(message.url, self.allow_private);
        let url = url.map_err(|_| Trouble::AddressRefused)?;
        let signature = self.signature(&message).map_err(|_| Trouble::Unsendable)?;
        let mut request = self
            .client
            .post(url)
            .header("content-type", "application/json")
            .header("webhook-id", message.id)
            .header("webhook-timestamp", message.at.timestamp())
            .header("webhook-signature", signature)
            .body(message.body);
        // A log that was brought here may hold ids that no request may go by.
        if let Some(id) = message.request_id.filter(|id| is_request_id(id.as_bytes())) {
            request = request.header("x-request-id", id);
        }
        request.send().await.map_err(|error| trouble(&error))
    }

    /// One of each secret.
    fn signature(&self, message: &Message<'_>) -> Result<String, String> {
        let at = message.at.timestamp();
        let sign = |it: &Secret| webhook::sign(it.reveal(), message.id, at, &message.body);
        Ok(self.secrets.iter().map(sign).collect::<Result<Vec<_>, _>>()?.join(" "))
    }
}

/// Neither its length nor its end decides anything.
async fn take_in(mut response: Response) {
    let mut taken = 0;
    while let Ok(Some(chunk)) = response.chunk().await {
        taken += chunk.len();
        if taken >= LARGEST_ANSWER {
            return;
        }
    }
}

/// Seconds, or a date.
fn retry_after(response: &Response) -> Option<Duration> {
    let header = |name| response.headers().get(name)?.to_str().ok();
    let text = header(RETRY_AFTER)?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = |text: &str| DateTime::parse_from_rfc2822(text).ok();
    // Against the other side's own clock, so that it does not matter how it goes.
    (date(text)? - date(header(reqwest::header::DATE)?)?).to_std().ok()
}

/// The kind of it alone: an error of the client's may hold the URL.
fn trouble(error: &reqwest::Error) -> Trouble {
    let mut cause: Option<&(dyn StdError + 'static)> = Some(error);
    while let Some(found) = cause {
        if found.is::<Barred>() {
            return Trouble::AddressRefused;
        }
        cause = found.source();
    }
    match error {
        error if error.is_timeout() => Trouble::Timeout,
        error if error.is_connect() => Trouble::Connection,
        _ => Trouble::NoAnswer,
    }
}

/// A name leads to no address that is allowed.
#[derive(Debug, thiserror::Error)]
#[error("no address that is allowed")]
struct Barred;

/// Looks names up for the client, which connects to what it is given here and to nothing else: an
/// answer that changes between two look-ups changes nothing.
struct Gate {
    allow_private: bool,
}

impl Resolve for Gate {
    fn resolve(&self, name: Name) -> Resolving {
        let allow_private = self.allow_private;
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let allowed = |it: &SocketAddr| allow_private || is_public(it.ip());
            let allowed: Vec<SocketAddr> = found.filter(allowed).collect();
            match allowed.is_empty() {
                true => Err(Barred.into()),
                false => Ok(Box::new(allowed.into_iter()) as Addrs),
            }
        })
    }
}

#[cfg(test)]
#[path = "sender_tests.rs"]
mod tests;
