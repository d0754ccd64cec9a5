//! The issuer's key set, fetched over HTTP and kept fresh in the background. Requests never wait
//! for a refresh; they use the keys at hand, for up to a day if the issuer cannot be reached.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reqwest::redirect::Policy;
use reqwest::{Client, Response, StatusCode};
use tracing::{info, warn};

use super::jwt::KeySet;

/// How long, in seconds, keys are used when they cannot be refreshed.
pub const MAX_STALE_S: i64 = 24 * 60 * 60;
/// Tokens with unknown keys make the set be fetched at most once in this many seconds.
pub const REFETCH_EVERY_S: i64 = 30;

const REFRESH_EVERY_S: f64 = 300.0;
const FIRST_RETRY_S: f64 = 5.0;
const TIMEOUT: Duration = Duration::from_secs(5);
const MAX_BYTES: usize = 256 * 1024;

/// Gives the present time in Unix seconds.
pub type UnixClock = Arc<dyn Fn() -> i64 + Send + Sync>;

/// A key set could not be fetched; the keys at hand stay as they are.
#[derive(Debug, thiserror::Error)]
#[error("fetching the key set: {0}")]
pub struct Error(String);

/// A key set at a URL.
pub struct Jwks {
    url: String,
    client: Client,
    clock: UnixClock,
    state: Mutex<State>,
    /// Held while a request is under way, so that there is one at most.
    flight: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    held: Option<Held>,
    /// Unix seconds of the last request, whatever came of it.
    asked_at: Option<i64>,
}

struct Held {
    keys: Arc<KeySet>,
    fetched_at: i64,
}

impl Jwks {
    /// Prepares for the key set at `url`; nothing is fetched yet.
    ///
    /// # Errors
    /// When the HTTP client cannot be set up (no certificate store, for one).
    pub fn new(url: &str, clock: UnixClock) -> Result<Self, Error> {
        let client = Client::builder()
            .timeout(TIMEOUT)
            // A redirect could send us to keys of somebody else's.
            .redirect(Policy::none())
            .build()
            .map_err(|error| Error(error.to_string()))?;
        Ok(Self {
            url: url.to_owned(),
            client,
            clock,
            state: Mutex::default(),
            flight: tokio::sync::Mutex::default(),
        })
    }

    /// The keys at hand, unless they are more than a day old.
    pub fn current(&self) -> Option<Arc<KeySet>> {
        let now = (self.clock)();
        let state = self.state();
        let held = state.held.as_ref()?;
        (now.saturating_sub(held.fetched_at) <= MAX_STALE_S).then(|| Arc::clone(&held.keys))
    }

    /// When they were, in Unix seconds.
    pub fn fetched_at(&self) -> Option<i64> {
        Some(self.state().held.as_ref()?.fetched_at)
    }

    /// Fetches the key set now; callers that come while one is being fetched share its outcome.
    ///
    /// # Errors
    /// When the issuer does not answer with a usable key set; the old keys stay.
    pub async fn refresh(&self) -> Result<(), Error> {
        let _flight = self.flight.lock().await;
        self.fetch_in_flight().await
    }

    /// What a token with an unknown key asks for: a fetch, at most one per [`REFETCH_EVERY_S`] for
    /// all callers together. Comes back when the keys at hand are as fresh as they will get.
    pub async fn refetch_for_unknown_key(&self) {
        let _flight = self.flight.lock().await;
        if self.asked_lately() {
            return;
        }
        if let Err(error) = self.fetch_in_flight().await {
            warn!(%error, "a token has an unknown key, and the key set could not be fetched");
        }
    }

    /// Keeps the keys fresh until dropped: about every five minutes, sooner after a failure.
    /// `random` gives numbers from 0 to 1 that spread the nodes' requests.
    pub async fn run(self: Arc<Self>, mut random: impl FnMut() -> f64 + Send) {
        let mut retry_s = FIRST_RETRY_S;
        loop {
            let wait_s = match self.refresh().await {
                Ok(()) => {
                    retry_s = FIRST_RETRY_S;
                    REFRESH_EVERY_S
                }
                Err(error) => {
                    let usable = self.current();
                    match usable {
                        Some(_) => {
                            warn!(%error, "the keys could not be refreshed; the old ones stay")
                        }
                        None => {
                            warn!(%error, "the keys could not be fetched: no token is accepted")
                        }
                    }
                    let wait_s = retry_s;
                    retry_s = (retry_s * 2.0).min(REFRESH_EVERY_S);
                    wait_s
                }
            };
            let jitter = 0.9 + 0.2 * random().clamp(0.0, 1.0);
            tokio::time::sleep(Duration::from_secs_f64(wait_s * jitter)).await;
        }
    }

    fn asked_lately(&self) -> bool {
        let now = (self.clock)();
        // A clock that was set back must not forbid asking until it has caught up.
        self.state()
            .asked_at
            .is_some_and(|asked_at| (0..REFETCH_EVERY_S).contains(&now.saturating_sub(asked_at)))
    }

    /// Only with `flight` held.
    async fn fetch_in_flight(&self) -> Result<(), Error> {
        self.state().asked_at = Some((self.clock)());
        let body = self.download().await?;
        let keys = KeySet::from_jwks(&body).map_err(Error)?;
        let mut state = self.state();
        if state.held.is_none() {
            info!(?keys, "the issuer's key set has been fetched");
        }
        state.held = Some(Held { keys: Arc::new(keys), fetched_at: (self.clock)() });
        Ok(())
    }

    async fn download(&self) -> Result<String, Error> {
        let failed = |error: reqwest::Error| Error(error.without_url().to_string());
        let mut response = self.client.get(&self.url).send().await.map_err(failed)?;
        check_answer(&response)?;
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(failed)? {
            if body.len() + chunk.len() > MAX_BYTES {
                return Err(too_large());
            }
            body.extend_from_slice(&chunk);
        }
        String::from_utf8(body).map_err(|_| Error("the answer is not UTF-8".to_owned()))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn check_answer(response: &Response) -> Result<(), Error> {
    if response.status() != StatusCode::OK {
        return Err(Error(format!("the answer's status is {}", response.status().as_u16())));
    }
    if response.content_length().is_some_and(|length| length > MAX_BYTES as u64) {
        return Err(too_large());
    }
    Ok(())
}

fn too_large() -> Error {
    Error(format!("the answer is larger than {MAX_BYTES} bytes"))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};

    use serde_json::json;

    use super::*;
    use crate::clerk::jwt::{Rejected, Rules};
    use crate::clerk::signing::SigningKey;
    use crate::clerk::{Authenticator, Keys};

    static KEYS: LazyLock<[SigningKey; 2]> =
        LazyLock::new(|| ["one", "two"].map(|kid| SigningKey::generate(kid).unwrap()));
    const NOW: i64 = 1_893_456_000;

    /// An HTTP server on a loopback port that counts requests and answers each with `answer`.
    struct Issuer {
        url: String,
        asked: Arc<AtomicUsize>,
        answer: Arc<Mutex<String>>,
    }

    impl Issuer {
        fn start(answer: String) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let url = format!("http://{}/.well-known/jwks.json", listener.local_addr().unwrap());
            let asked = Arc::new(AtomicUsize::new(0));
            let answer = Arc::new(Mutex::new(answer));
            let (count, current) = (Arc::clone(&asked), Arc::clone(&answer));
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    count.fetch_add(1, Ordering::SeqCst);
                    let answer = current.lock().unwrap().clone();
                    serve(stream.unwrap(), &answer);
                }
            });
            Self { url, asked, answer }
        }

        fn asked(&self) -> usize {
            self.asked.load(Ordering::SeqCst)
        }

        fn answers(&self, answer: String) {
            *self.answer.lock().unwrap() = answer;
        }
    }

    fn serve(mut stream: TcpStream, answer: &str) {
        let mut request = Vec::new();
        let mut buffer = [0; 1024];
        while !request.windows(4).any(|end| end == b"\r\n\r\n") {
            match stream.read(&mut buffer) {
                Ok(0) | Err(_) => return,
                Ok(length) => request.extend_from_slice(&buffer[..length]),
            }
        }
        // The client hangs up on answers it does not like.
        let _ = stream.write_all(answer.as_bytes());
    }

    fn http(status: &str, headers: &str, body: &str) -> String {
        format!("HTTP/1.1 {status}\r\nConnection: close\r\n{headers}\r\n{body}")
    }

    fn ok(body: &str) -> String {
        http("200 OK", &format!("Content-Length: {}\r\n", body.len()), body)
    }

    fn set_of(key: &SigningKey) -> String {
        key.jwks_json().to_string()
    }

    fn jwks(url: &str) -> (Arc<Jwks>, Arc<AtomicI64>) {
        let time = Arc::new(AtomicI64::new(NOW));
        let clock = Arc::clone(&time);
        let jwks = Jwks::new(url, Arc::new(move || clock.load(Ordering::SeqCst))).unwrap();
        (Arc::new(jwks), time)
    }

    fn token(key: &SigningKey) -> String {
        key.sign(&json!({ "sub": "user_1", "iat": NOW, "exp": NOW + 1000 })).unwrap()
    }

    #[tokio::test]
    async fn the_first_token_fetches_the_keys_and_the_next_ones_use_them() {
        let issuer = Issuer::start(ok(&set_of(&KEYS[0])));
        let (jwks, _) = jwks(&issuer.url);
        let authenticator = Authenticator::new(Keys::Fetched(jwks), Rules::default());
        assert!(!authenticator.has_keys());
        for _ in 0..5 {
            let verified = authenticator.authenticate(&token(&KEYS[0]), NOW).await.unwrap();
            assert_eq!(verified.user_id, "user_1");
        }
        assert!(authenticator.has_keys());
        assert_eq!(issuer.asked(), 1);
    }

    #[tokio::test]
    async fn unknown_keys_cost_one_request_in_thirty_seconds_however_many_ask() {
        let issuer = Issuer::start(ok(&set_of(&KEYS[0])));
        let (jwks, time) = jwks(&issuer.url);
        jwks.refresh().await.unwrap();
        let authenticator = Authenticator::new(Keys::Fetched(jwks), Rules::default());
        let stranger = token(&KEYS[1]);
        let flood = || async {
            let asking = (0..50).map(|_| authenticator.authenticate(&stranger, NOW));
            futures_util::future::join_all(asking).await
        };
        time.store(NOW + 29, Ordering::SeqCst);
        assert!(flood().await.iter().all(|verdict| *verdict == Err(Rejected::UnknownKey)));
        assert_eq!(issuer.asked(), 1);
        time.store(NOW + 30, Ordering::SeqCst);
        issuer.answers(ok(&set_of(&KEYS[1])));
        assert!(flood().await.iter().all(Result::is_ok), "the rotated key is found");
        assert_eq!(issuer.asked(), 2);
        // The old key is gone, and so is what was cached under it.
        assert_eq!(
            authenticator.authenticate(&token(&KEYS[0]), NOW).await,
            Err(Rejected::UnknownKey)
        );
        assert_eq!(issuer.asked(), 2);
        time.store(NOW - 86_400, Ordering::SeqCst);
        assert!(authenticator.authenticate(&token(&KEYS[0]), NOW).await.is_err());
        assert_eq!(issuer.asked(), 3, "a clock set back does not forbid asking");
    }

    #[tokio::test]
    async fn keys_are_served_for_a_day_while_the_issuer_is_down_and_then_no_more() {
        let issuer = Issuer::start(ok(&set_of(&KEYS[0])));
        let (jwks, time) = jwks(&issuer.url);
        jwks.refresh().await.unwrap();
        issuer.answers(http("503 Service Unavailable", "Content-Length: 0\r\n", ""));
        assert!(jwks.refresh().await.is_err());
        time.store(NOW + MAX_STALE_S, Ordering::SeqCst);
        assert!(jwks.current().is_some());
        time.store(NOW + MAX_STALE_S + 1, Ordering::SeqCst);
        assert!(jwks.current().is_none());
        let authenticator = Authenticator::new(Keys::Fetched(jwks), Rules::default());
        let verdict = authenticator.authenticate(&token(&KEYS[0]), NOW).await;
        assert_eq!(verdict, Err(Rejected::NoKeys));
    }

    #[tokio::test]
    async fn answers_that_are_no_key_set_leave_the_old_keys_in_place() {
        let issuer = Issuer::start(ok(&set_of(&KEYS[0])));
        let (jwks, _) = jwks(&issuer.url);
        jwks.refresh().await.unwrap();
        let good = set_of(&KEYS[1]);
        let padded = format!("{good}{}", " ".repeat(MAX_BYTES));
        let elsewhere = Issuer::start(ok(&good));
        let chunked = format!("{:x}\r\n{padded}\r\n0\r\n\r\n", padded.len());
        let bad_answers = [
            ok(""),
            ok("[]"),
            ok("{\"keys\":[]}"),
            ok("<html>"),
            ok(&good[..good.len() - 2]),
            ok(&padded),
            http("200 OK", "Transfer-Encoding: chunked\r\n", &chunked),
            http("200 OK", "Content-Length: 999999999\r\n", &good),
            http("302 Found", &format!("Location: {}\r\nContent-Length: 0\r\n", elsewhere.url), ""),
            http("404 Not Found", &format!("Content-Length: {}\r\n", good.len()), &good),
            http("500 Internal Server Error", "Content-Length: 0\r\n", ""),
            "SSH-2.0-OpenSSH_9.2\r\n".to_owned(),
            String::new(),
        ];
        for answer in bad_answers {
            issuer.answers(answer.clone());
            let outcome = jwks.refresh().await;
            assert!(outcome.is_err(), "{}", &answer[..answer.len().min(200)]);
            assert!(!outcome.unwrap_err().to_string().contains("127.0.0.1"));
        }
        assert_eq!(elsewhere.asked(), 0, "a redirect is not followed");
        let held = jwks.current().unwrap();
        let rules = Rules::default();
        assert!(crate::clerk::jwt::verify(&token(&KEYS[0]), &held, &rules, NOW).is_ok());
    }

    #[tokio::test]
    async fn a_server_that_accepts_and_says_nothing_is_given_up_on() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let (jwks, _) = jwks(&url);
        // The operating system accepts into the backlog; nobody ever answers.
        let outcome = tokio::time::timeout(TIMEOUT * 3, jwks.refresh()).await;
        assert!(outcome.expect("the client's own timeout comes first").is_err());
        drop(listener);
    }

    #[tokio::test]
    async fn the_background_task_fetches_at_once() {
        let issuer = Issuer::start(ok(&set_of(&KEYS[0])));
        let (jwks, _) = jwks(&issuer.url);
        let task = tokio::spawn(Arc::clone(&jwks).run(|| 0.5));
        while jwks.current().is_none() {
            tokio::task::yield_now().await;
        }
        task.abort();
        assert_eq!(issuer.asked(), 1);
    }
}
