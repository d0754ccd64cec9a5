//! Clerk's Backend API: the few calls that T2M makes, with their patience. All callers share one
//! handle, so that a 429 makes all of them wait.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use reqwest::redirect::Policy;
use reqwest::{Client, Method, header};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use tokio::time::Instant;
use url::Url;

use super::jwks::UnixClock;
use super::payload::User;
use crate::config::BackendApi;

/// The most users of one page: for 501 Clerk silently gives 10.
pub const PAGE: usize = 500;
/// The most requests that anybody here has under way at once.
pub const AT_ONCE: usize = 10;

/// The version of the API that these calls were checked against, as `@clerk/backend` 3.20.1 names it.
const API_VERSION: &str = "2026-05-12";
const TIMEOUT: Duration = Duration::from_secs(10);
/// A page of 500 users with all the metadata they may have.
const MAX_BYTES: usize = 32 * 1024 * 1024;
/// How often a request is sent at the most.
const TRIES: u32 = 5;
const FIRST_RETRY: Duration = Duration::from_millis(500);
/// The longest wait that a `Retry-After` is believed.
const MAX_WAIT: Duration = Duration::from_secs(60);

/// Why a call came to nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("Clerk does not accept CLERK_SECRET_KEY")]
    Unauthorized,
    #[error("Clerk knows no such thing")]
    NotFound,
    /// Still, after waiting as often as was asked for.
    #[error("Clerk answers that there are too many requests")]
    RateLimited,
    /// Trying again would change nothing.
    #[error("Clerk refuses the request with status {status}")]
    Rejected { status: u16 },
    #[error("Clerk cannot be reached: {0}")]
    Unreachable(String),
}

impl Error {
    /// Whether the same call would end the same way at another time.
    pub fn is_final(&self) -> bool {
        match self {
            Self::NotFound | Self::Rejected { .. } => true,
            // A key can be exchanged; until then nothing must be lost.
            Self::Unauthorized | Self::RateLimited | Self::Unreachable(_) => false,
        }
    }
}

/// One request.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    pub method: Method,
    pub url: Url,
    pub body: Option<Value>,
}

/// What came back, whatever its status.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    pub retry_after: Option<String>,
    pub body: Vec<u8>,
}

/// What carries requests: HTTP, or a test.
#[async_trait]
pub trait Transport: Send + Sync {
    /// Sends `request` once.
    ///
    /// # Errors
    /// What went wrong when no whole answer came, without the secret.
    async fn send(&self, request: Request) -> Result<Answer, String>;
}

/// The Backend API at one address with one key.
pub struct Api {
    base: Url,
    transport: Box<dyn Transport>,
    clock: UnixClock,
    /// Numbers from 0 to 1 that keep clients from trying again in step.
    random: fn() -> f64,
    /// Nobody sends anything before.
    paused_until: Mutex<Option<Instant>>,
}

impl Api {
    /// Prepares for calls over HTTP; none is made yet.
    ///
    /// # Errors
    /// When the HTTP client cannot be set up (no certificate store, for one).
    pub fn new(settings: &BackendApi, clock: UnixClock) -> Result<Self, Error> {
        let http = Http::new(settings.secret_key.reveal())?;
        Ok(Self::over(Box::new(http), settings.url.clone(), clock, rand::random::<f64>))
    }

    /// Calls over any transport, with `random` from 0 to 1.
    pub fn over(
        transport: Box<dyn Transport>,
        base: Url,
        clock: UnixClock,
        random: fn() -> f64,
    ) -> Self {
        Self { base, transport, clock, random, paused_until: Mutex::default() }
    }

    /// `GET /v1/users/{id}`
    ///
    /// # Errors
    /// [`Error`], as for all calls.
    pub async fn user(&self, user_id: &str) -> Result<User, Error> {
        self.call(Method::GET, &["users", user_id], "").await
    }

    /// `PATCH /v1/users/{id}/metadata`: merges `patch` deeply into the public metadata; `null`
    /// removes a key. Sending it twice is the same as once.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn merge_metadata(
        &self,
        user_id: &str,
        patch: Map<String, Value>,
    ) -> Result<(), Error> {
        let answer = self.send(self.merging(user_id, patch)).await?;
        read::<Value>(&answer).map(drop)
    }

    /// The same, sent once, and not while a 429 makes all wait: whoever overwrites what it has just
    /// looked at looks anew before each try.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn merge_metadata_once(
        &self,
        user_id: &str,
        patch: Map<String, Value>,
    ) -> Result<(), Error> {
        if self.paused().is_some_and(|until| until > Instant::now()) {
            return Err(Error::RateLimited);
        }
        let answer = self.send_once(self.merging(user_id, patch), FIRST_RETRY).await?;
        read::<Value>(&answer).map(drop)
    }

    fn merging(&self, user_id: &str, patch: Map<String, Value>) -> Request {
        let body = json!({ "public_metadata": patch });
        self.request(Method::PATCH, &["users", user_id, "metadata"], "", Some(body))
    }

    /// `GET /v1/users`: up to [`PAGE`] users after the `offset` newest. Users who sign up meanwhile
    /// make the next page repeat some of this one; those who are deleted make it pass over others.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn users(&self, offset: usize) -> Result<Vec<User>, Error> {
        let query = format!("limit={PAGE}&offset={offset}&order_by=-created_at");
        self.call(Method::GET, &["users"], &query).await
    }

    /// `POST /v1/sessions/{id}/revoke`: it mints no more tokens.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn revoke_session(&self, session_id: &str) -> Result<(), Error> {
        let path = ["sessions", session_id, "revoke"];
        self.call::<Value>(Method::POST, &path, "").await.map(drop)
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &[&str],
        query: &str,
    ) -> Result<T, Error> {
        read(&self.send(self.request(method, path, query, None)).await?)
    }

    fn request(&self, method: Method, path: &[&str], query: &str, body: Option<Value>) -> Request {
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().push("v1").extend(path);
        }
        url.set_query(Some(query).filter(|query| !query.is_empty()));
        Request { method, url, body }
    }

    /// Sends until there is an answer to go by, [`TRIES`] times at the most.
    async fn send(&self, request: Request) -> Result<Vec<u8>, Error> {
        let mut retry = FIRST_RETRY;
        for tries_left in (0..TRIES).rev() {
            self.pause().await;
            match self.send_once(request.clone(), retry).await {
                // The pause is the wait.
                Err(Error::RateLimited) if tries_left > 0 => {}
                Err(Error::Unreachable(_)) if tries_left > 0 => {
                    tokio::time::sleep(self.jittered(retry)).await;
                }
                done => return done,
            }
            retry *= 2;
        }
        Err(Error::RateLimited)
    }

    /// A 429 makes all wait, for as long as it says or else about `otherwise`.
    async fn send_once(&self, request: Request, otherwise: Duration) -> Result<Vec<u8>, Error> {
        let answer = self.transport.send(request).await.map_err(Error::Unreachable)?;
        let judged = judge(&answer);
        if judged == Err(Error::RateLimited) {
            self.pause_all(answer.retry_after.as_deref(), otherwise);
        }
        judged.map(|()| answer.body)
    }

    async fn pause(&self) {
        // It may have been extended while this one slept.
        while let Some(until) = self.paused().filter(|until| *until > Instant::now()) {
            tokio::time::sleep_until(until).await;
        }
    }

    fn paused(&self) -> Option<Instant> {
        *self.paused_until.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pause_all(&self, retry_after: Option<&str>, otherwise: Duration) {
        let asked = retry_after.and_then(|text| wait_of(text, (self.clock)()));
        let until = Instant::now() + asked.unwrap_or_else(|| self.jittered(otherwise));
        let mut paused = self.paused_until.lock().unwrap_or_else(PoisonError::into_inner);
        *paused = Some(paused.map_or(until, |present| present.max(until)));
    }

    fn jittered(&self, wait: Duration) -> Duration {
        wait.mul_f64(0.5 + (self.random)().clamp(0.0, 1.0))
    }
}

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Api").field("base", &self.base.as_str()).finish_non_exhaustive()
    }
}

fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(body)
        .map_err(|_| Error::Unreachable("the answer cannot be understood".to_owned()))
}

fn judge(answer: &Answer) -> Result<(), Error> {
    match answer.status {
        200..=299 => Ok(()),
        401 | 403 => Err(Error::Unauthorized),
        404 => Err(Error::NotFound),
        429 => Err(Error::RateLimited),
        408 | 500.. => Err(Error::Unreachable(format!("it answers {}", answer.status))),
        status => Err(Error::Rejected { status }),
    }
}

/// RFC 9110, section 10.2.3: seconds, or a date; [`MAX_WAIT`] at the most.
fn wait_of(retry_after: &str, now: i64) -> Option<Duration> {
    let text = retry_after.trim();
    let seconds = text.parse::<u64>().ok().or_else(|| {
        let date = chrono::DateTime::parse_from_rfc2822(text).ok()?;
        Some(u64::try_from(date.timestamp().saturating_sub(now)).unwrap_or(0))
    })?;
    Some(Duration::from_secs(seconds).min(MAX_WAIT))
}

/// The real transport.
struct Http(Client);

impl Http {
    fn new(secret_key: &str) -> Result<Self, Error> {
        let unusable = |what: String| Error::Unreachable(what);
        let mut bearer = header::HeaderValue::from_str(&format!("Bearer {secret_key}"))
            .map_err(|_| unusable("CLERK_SECRET_KEY cannot stand in a header".to_owned()))?;
        bearer.set_sensitive(true);
        let json = header::HeaderValue::from_static("application/json");
        let version = header::HeaderValue::from_static(API_VERSION);
        let headers = [
            (header::AUTHORIZATION, bearer),
            // The official client says so of requests without a body, too.
            (header::CONTENT_TYPE, json),
            (header::HeaderName::from_static("clerk-api-version"), version),
        ];
        let client = Client::builder()
            .timeout(TIMEOUT)
            // A redirect could take the secret to somebody else.
            .redirect(Policy::none())
            .user_agent(concat!("t2m/", env!("CARGO_PKG_VERSION")))
            .default_headers(headers.into_iter().collect())
            .build()
            .map_err(|error| unusable(error.to_string()))?;
        Ok(Self(client))
    }
}

#[async_trait]
impl Transport for Http {
    async fn send(&self, request: Request) -> Result<Answer, String> {
        let failed = |error: reqwest::Error| error.without_url().to_string();
        let mut building = self.0.request(request.method, request.url);
        if let Some(body) = request.body {
            building = building.body(body.to_string());
        }
        let mut response = building.send().await.map_err(failed)?;
        let retry_after = response.headers().get(header::RETRY_AFTER);
        let retry_after = retry_after.and_then(|value| value.to_str().ok()).map(str::to_owned);
        let mut answer =
            Answer { status: response.status().as_u16(), retry_after, body: Vec::new() };
        while let Some(chunk) = response.chunk().await.map_err(failed)? {
            if answer.body.len() + chunk.len() > MAX_BYTES {
                return Err(format!("the answer is larger than {MAX_BYTES} bytes"));
            }
            answer.body.extend_from_slice(&chunk);
        }
        Ok(answer)
    }
}

/// A clock for [`Api::new`].
pub fn unix_clock(clock: &crate::clock::Clock) -> UnixClock {
    let clock = clock.clone();
    Arc::new(move || clock.now().timestamp())
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    const NOW: i64 = 1_893_456_000;

    /// Answers with what it was given, in that order, and notes when it was asked.
    #[derive(Clone, Default)]
    struct Script(Arc<Mutex<Scene>>);

    #[derive(Default)]
    struct Scene {
        answers: VecDeque<Result<Answer, String>>,
        asked: Vec<(Duration, Request)>,
    }

    #[async_trait]
    impl Transport for Script {
        async fn send(&self, request: Request) -> Result<Answer, String> {
            let mut scene = self.0.lock().unwrap();
            scene.asked.push((START.with(|start| start.elapsed()), request));
            scene.answers.pop_front().expect("the script goes on")
        }
    }

    thread_local!(static START: Instant = Instant::now());

    fn answer(status: u16, retry_after: Option<&str>) -> Result<Answer, String> {
        let retry_after = retry_after.map(str::to_owned);
        Ok(Answer { status, retry_after, body: b"{}".to_vec() })
    }

    fn api(answers: impl IntoIterator<Item = Result<Answer, String>>) -> (Api, Script) {
        START.with(|_| ());
        let script = Script::default();
        script.0.lock().unwrap().answers.extend(answers);
        let base = Url::parse("https://api.clerk.test/").unwrap();
        (Api::over(Box::new(script.clone()), base, Arc::new(|| NOW), || 0.5), script)
    }

    fn asked_at_ms(script: &Script) -> Vec<u128> {
        script.0.lock().unwrap().asked.iter().map(|(at, _)| at.as_millis()).collect()
    }

    async fn check(answers: Vec<Result<Answer, String>>, then: Result<(), Error>, at_ms: &[u128]) {
        let (api, script) = api(answers);
        assert_eq!(api.revoke_session("sess_1").await, then);
        assert_eq!(asked_at_ms(&script), at_ms);
    }

    #[tokio::test(start_paused = true)]
    async fn a_429_waits_as_long_as_it_is_told_in_seconds() {
        check(vec![answer(429, Some("7")), answer(200, None)], Ok(()), &[0, 7000]).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_429_waits_until_the_date_that_it_is_told() {
        let date = Some("Tue, 01 Jan 2030 00:00:09 GMT");
        check(vec![answer(429, date), answer(200, None)], Ok(()), &[0, 9000]).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_429_is_not_believed_beyond_a_minute_and_a_past_date_is_now() {
        let answers = vec![
            answer(429, Some("86400")),
            answer(429, Some("Tue, 01 Jan 2019 00:00:00 GMT")),
            answer(200, None),
        ];
        check(answers, Ok(()), &[0, 60_000, 60_000]).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_429_without_a_word_or_with_nonsense_waits_longer_each_time_and_then_gives_up() {
        let answers = vec![
            answer(429, None),
            answer(429, Some("soon")),
            answer(429, Some("-3")),
            answer(429, None),
            answer(429, None),
        ];
        let at_ms = [0, 500, 1500, 3500, 7500];
        check(answers, Err(Error::RateLimited), &at_ms).await;
    }

    #[tokio::test(start_paused = true)]
    async fn what_may_pass_is_tried_again_and_what_will_not_is_told_at_once() {
        let down = || Err("connection refused".to_owned());
        check(vec![down(), answer(503, None), answer(200, None)], Ok(()), &[0, 500, 1500]).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_is_told_at_once() {
        for (status, error) in [
            (401, Error::Unauthorized),
            (404, Error::NotFound),
            (422, Error::Rejected { status: 422 }),
            (302, Error::Rejected { status: 302 }),
        ] {
            check(vec![answer(status, None)], Err(error), &[0]).await;
        }
        let (api, script) = api((0..5).map(|_| answer(500, None)));
        let error = api.revoke_session("sess_1").await.unwrap_err();
        assert_eq!(error, Error::Unreachable("it answers 500".to_owned()));
        assert!(!error.is_final());
        assert_eq!(asked_at_ms(&script).len(), 5);
    }

    #[tokio::test(start_paused = true)]
    async fn a_429_to_one_holds_up_all() {
        let (api, script) = api([answer(429, Some("5")), answer(200, None), answer(200, None)]);
        let second = async {
            tokio::task::yield_now().await;
            api.revoke_session("sess_2").await
        };
        let (one, two) = tokio::join!(api.revoke_session("sess_1"), second);
        assert_eq!((one, two), (Ok(()), Ok(())));
        assert_eq!(asked_at_ms(&script), [0, 5000, 5000]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_of_what_was_looked_at_is_sent_once_and_never_after_a_wait() {
        let (api, script) = api([answer(503, None), answer(429, Some("5")), answer(200, None)]);
        let change = || api.merge_metadata_once("user_1", Map::new());
        assert_eq!(change().await, Err(Error::Unreachable("it answers 503".to_owned())));
        assert_eq!(change().await, Err(Error::RateLimited));
        assert_eq!(change().await, Err(Error::RateLimited));
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(change().await, Ok(()));
        assert_eq!(asked_at_ms(&script), [0, 0, 5000]);
    }

    #[tokio::test(start_paused = true)]
    async fn ids_cannot_leave_their_place_in_the_path() {
        let (api, script) = api([answer(200, None), answer(200, None)]);
        let patch = Map::from_iter([("role".to_owned(), json!("x"))]);
        api.merge_metadata("user_1/../../a?b", patch).await.unwrap();
        let _ = api.users(500).await;
        let requests = &script.0.lock().unwrap().asked;
        let urls: Vec<_> = requests.iter().map(|(_, request)| request.url.as_str()).collect();
        assert_eq!(
            urls,
            [
                "https://api.clerk.test/v1/users/user_1%2F..%2F..%2Fa%3Fb/metadata",
                "https://api.clerk.test/v1/users?limit=500&offset=500&order_by=-created_at",
            ]
        );
        assert_eq!(requests[0].1.body, Some(json!({ "public_metadata": { "role": "x" } })));
    }
}
