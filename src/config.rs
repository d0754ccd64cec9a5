//! Flags, environment and `.env`, checked once at start: what has the type [`Settings`] is usable.

use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;

use chrono::TimeDelta;
use clap::{ArgAction, Args, ValueEnum};
use url::{Host, Url};

mod backend;
mod callbacks;
mod engine;
mod traces;

pub use backend::{BackendApi, BackendOptions};
pub use callbacks::{CallbackOptions, CallbackSettings};
pub use engine::{Engine, EngineLimits, LimitOptions};
pub use traces::TraceOptions;

const GIB: u64 = 1024 * 1024 * 1024;

/// The options of the server, each a flag and an environment variable (CONTRACT §1).
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Address and port; port 0 picks a free one and prints it; `:PORT` is of this machine only
    #[arg(long, env = "T2M_LISTEN", default_value = LISTEN, value_parser = listen_address)]
    pub listen: SocketAddr,
    /// Everything that is kept on this machine
    #[arg(long, env = "T2M_DATA_DIR", default_value = "./data")]
    pub data_dir: PathBuf,
    /// The log's engine: `embedded`, `postgres://user:password@host/database` or
    /// `esdb://user:password@host:2113`
    #[arg(long, env = "T2M_LOG", default_value = "embedded", hide_env_values = true)]
    pub log: String,
    /// Where files lie: `file` (under the data directory) or `s3://bucket/prefix` (see `AWS_…`)
    #[arg(long, env = "T2M_BLOBS", default_value = "file")]
    pub blobs: String,
    /// Prefix of the links that are handed out [default: from the listen address]
    #[arg(long, env = "PUBLIC_URL")]
    pub public_url: Option<String>,
    /// `production` refuses every development shortcut
    #[arg(long, env = "ENVIRONMENT", default_value = "development")]
    pub environment: Environment,
    /// Every request is `dev_user` (role admin, tier premium); `X-Dev-User` picks another
    #[arg(long, env = "DEV_MODE", default_value = "false", action = ArgAction::Set,
          num_args = 0..=1, default_missing_value = "true", value_parser = clap::builder::BoolishValueParser::new())]
    pub dev_mode: bool,
    /// Required issuer of tokens; also where their keys are fetched unless one is given
    #[arg(long, env = "CLERK_ISSUER")]
    pub clerk_issuer: Option<String>,
    /// PEM public key: verification without the network
    #[arg(long, env = "CLERK_JWT_KEY", hide_env_values = true)]
    pub clerk_jwt_key: Option<String>,
    /// Where the keys are fetched [default: from the issuer]
    #[arg(long, env = "CLERK_JWKS_URL")]
    pub clerk_jwks_url: Option<String>,
    /// Required `aud`; empty: not checked
    #[arg(long, env = "CLERK_AUDIENCE", default_value = "t2m-api")]
    pub clerk_audience: String,
    /// Comma list for `azp`, checked when the token has one
    #[arg(long, env = "CLERK_AUTHORIZED_PARTIES")]
    pub clerk_authorized_parties: Option<String>,
    /// `whsec_…`; several, comma separated, while rotating (alias `CLERK_WEBHOOK_SIGNING_SECRET`)
    #[arg(long, env = "CLERK_WEBHOOK_SECRET", hide_env_values = true)]
    pub clerk_webhook_secret: Option<String>,
    #[command(flatten)]
    pub backend: BackendOptions,
    /// Comma list: the first signs links, all verify [default in development: made and kept]
    #[arg(long, env = "FILE_SIGNING_SECRET", hide_env_values = true)]
    pub file_signing_secret: Option<String>,
    /// Exact origins, comma separated, for CORS and CSRF [default: PUBLIC_URL]
    #[arg(long, env = "ALLOWED_ORIGINS")]
    pub allowed_origins: Option<String>,
    /// Largest upload, in bytes
    #[arg(long, env = "MAX_UPLOAD_BYTES", default_value_t = 2 * 1024 * 1024 * 1024)]
    pub max_upload_bytes: u64,
    /// How long an upload in pieces (tus) may take before what came of it is removed
    #[arg(long, env = "UPLOAD_LIFETIME", default_value = "24h")]
    pub upload_lifetime: String,
    /// Bytes a user of tier `standard` may store
    #[arg(long, env = "QUOTA_STANDARD_BYTES", default_value_t = 10 * GIB)]
    pub quota_standard_bytes: u64,
    /// The same of tiers `premium` and `enterprise`
    #[arg(long, env = "QUOTA_PREMIUM_BYTES", default_value_t = 1024 * GIB)]
    pub quota_premium_bytes: u64,
    /// How long the outputs of jobs of tier `standard` are kept, e.g. `30d`, or `never` deleted
    #[arg(long, env = "RETENTION_STANDARD", default_value = "30d")]
    pub retention_standard: String,
    /// The same of tiers `premium` and `enterprise`
    #[arg(long, env = "RETENTION_PREMIUM", default_value = "365d")]
    pub retention_premium: String,
    /// Writes a user may ask for, as number/time, in a sliding window
    #[arg(long, env = "RATE_LIMIT_WRITES", default_value = "100/1h")]
    pub rate_limit_writes: String,
    /// Reads a user may ask for, likewise
    #[arg(long, env = "RATE_LIMIT_READS", default_value = "7200/1h")]
    pub rate_limit_reads: String,
    /// Signed links a user may ask for, likewise
    #[arg(long, env = "RATE_LIMIT_LINKS", default_value = "3600/1h")]
    pub rate_limit_links: String,
    /// Requests of an IP address (IPv6: /64) that prove nothing about their sender, likewise
    #[arg(long, env = "RATE_LIMIT_ANONYMOUS", default_value = "600/1m")]
    pub rate_limit_anonymous: String,
    /// Addresses and networks, comma separated, whose `X-Forwarded-For` is believed [default: none]
    #[arg(long, env = "T2M_TRUSTED_PROXIES", default_value = "", hide_default_value = true)]
    pub trusted_proxies: String,
    /// Users who have not finished onboarding get 403 `onboarding_required`
    #[arg(long, env = "REQUIRE_ONBOARDING", default_value = "false", action = ArgAction::Set,
          num_args = 0..=1, default_missing_value = "true", value_parser = clap::builder::BoolishValueParser::new())]
    pub require_onboarding: bool,
    /// Bearer tokens for remote workers, comma separated; in production of 24 characters at least
    /// [default: none]
    #[arg(long, env = "T2M_WORKER_TOKENS", hide_env_values = true)]
    pub worker_tokens: Option<String>,
    /// How many jobs of one user may run at once, in each class
    #[arg(long, env = "T2M_RUNNING_PER_USER", default_value = "premium=4,standard=2,batch=2")]
    pub running_per_user: String,
    /// Event streams one user may have open at once
    #[arg(long, env = "T2M_STREAMS_PER_USER", default_value_t = 16,
          value_parser = clap::value_parser!(u32).range(1..))]
    pub streams_per_user: u32,
    /// Seconds after which a client that takes nothing of its answer is cut off
    #[arg(long, env = "T2M_STALLED_S", default_value_t = 120,
          value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub stalled_s: u32,
    /// Log lines as `text` or as `json`
    #[arg(long, env = "T2M_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    #[command(flatten)]
    pub traces: TraceOptions,
    /// What makes videos: `storyboard`, `command:PROGRAM ARGS…` or `none` (remote workers only)
    #[arg(long, env = "T2M_ENGINE", default_value = "storyboard")]
    pub engine: String,
    /// What translates: `command:PROGRAM ARGS…` or `none`
    #[arg(long, env = "T2M_TRANSLATION_ENGINE", default_value = "none")]
    pub translation_engine: String,
    #[command(flatten)]
    pub engine_limits: LimitOptions,
    #[command(flatten)]
    pub callbacks: CallbackOptions,
    /// 32 bytes, base64: seals the keys of users and secrets of jobs; of several, comma separated, the
    /// first seals and all open [default: made and kept in the data directory]
    #[arg(long, env = "T2M_MASTER_KEY", hide_env_values = true)]
    pub master_key: Option<Secret>,
}

/// A text that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// For the one place that needs it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// The key travels in every request, so that it goes in clear to no other machine.
fn is_encrypted_or_local(url: &Url) -> bool {
    let loopback = match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        None => return false,
    };
    let bare = url.query().is_none() && url.fragment().is_none();
    bare && (url.scheme() == "https" || (url.scheme() == "http" && loopback))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Environment {
    Development,
    Production,
}

/// Who may vouch for tokens.
#[derive(Clone)]
pub enum TokenKeys {
    /// `CLERK_JWT_KEY`.
    Pem(String),
    /// `CLERK_JWKS_URL`, or the issuer's.
    Jwks(String),
    /// The key that development makes and keeps in the data directory.
    Development,
}

/// Something that depends on the tier; `enterprise` has what `premium` has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByTier<T> {
    pub standard: T,
    pub premium: T,
}

/// How long the outputs of jobs are kept; nothing: for ever.
pub type Retention = ByTier<Option<TimeDelta>>;

/// Where the bytes of files lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BlobStore {
    /// Under the data directory.
    File,
    S3 {
        bucket: String,
        prefix: String,
        /// The usual variables for credentials, region and endpoint, by name.
        aws: Vec<(String, Secret)>,
    },
}

/// S3 copies no more in one request; a blob is copied to its name once it is whole.
const LARGEST_COPY_BYTES: u64 = 5 * GIB;

impl BlobStore {
    /// # Errors
    /// What is wrong with the text.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        if text == "file" {
            return Ok(Self::File);
        }
        let rest = text.strip_prefix("s3://").ok_or("neither `file` nor `s3://bucket/prefix`")?;
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let plain = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
        if bucket.len() < 3 || !bucket.chars().all(plain) {
            return Err("the bucket's name is not one of S3's");
        }
        let prefix = prefix.trim_end_matches('/');
        if !prefix.chars().all(|c| plain(c) || c == '/') || prefix.contains("//") {
            return Err("the prefix may hold letters, digits and - . _ / only");
        }
        let aws = std::env::vars().filter(|(name, _)| name.starts_with("AWS_"));
        let aws = aws.map(|(name, value)| (name, Secret(value))).collect();
        Ok(Self::S3 { bucket: bucket.to_owned(), prefix: prefix.to_owned(), aws })
    }
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

/// Checked settings.
#[derive(Clone)]
pub struct Settings {
    pub listen: SocketAddr,
    pub data_dir: PathBuf,
    pub log: String,
    pub blobs: BlobStore,
    pub public_url: Option<String>,
    pub environment: Environment,
    pub dev_mode: bool,
    pub token_keys: TokenKeys,
    pub issuer: Option<String>,
    pub audience: Option<String>,
    pub authorized_parties: Vec<String>,
    pub webhook_secrets: Option<String>,
    /// Set when changes are to be pushed to Clerk.
    pub backend: Option<BackendApi>,
    pub signing_secrets: Option<String>,
    pub allowed_origins: Option<Vec<String>>,
    pub max_upload_bytes: u64,
    pub upload_lifetime: TimeDelta,
    /// Bytes a user may store.
    pub quotas: ByTier<u64>,
    pub retention: Retention,
    pub rate_limit_writes: String,
    pub rate_limit_reads: String,
    pub rate_limit_links: String,
    pub rate_limit_anonymous: String,
    pub trusted_proxies: String,
    pub worker_tokens: Vec<Secret>,
    pub running_per_user: String,
    pub streams_per_user: u32,
    pub stalled_s: u32,
    pub log_format: LogFormat,
    /// The collector of traces.
    pub otlp_endpoint: Option<String>,
    pub engine: Engine,
    pub translation_engine: Engine,
    pub engine_limits: EngineLimits,
    pub callbacks: CallbackSettings,
    /// The base64 of a key.
    pub master_key: Option<Secret>,
    pub require_onboarding: bool,
}

const LISTEN: &str = "127.0.0.1:8080";
/// Characters of a worker's token in production; as many random letters are 128 bits and more.
const SHORTEST_TOKEN: usize = 24;

/// The issuer of the tokens that `t2m token` makes.
pub const DEVELOPMENT_ISSUER: &str = "https://t2m.localhost";

impl Options {
    /// The settings, and a line for each fault in them: all at once, each naming its variable and
    /// none showing a secret. What keys and secrets hold is checked where they are parsed.
    pub fn check(self) -> (Settings, Vec<String>) {
        let mut faults = Vec::new();
        let production = self.environment == Environment::Production;
        let issuer = present(self.clerk_issuer);
        let public_url = present(self.public_url);
        let webhook_secrets = present(self.clerk_webhook_secret)
            .or_else(|| present(std::env::var("CLERK_WEBHOOK_SIGNING_SECRET").ok()));
        let signing_secrets = present(self.file_signing_secret);
        let jwks_url = present(self.clerk_jwks_url);
        let token_keys =
            token_keys(present(self.clerk_jwt_key), jwks_url.clone(), issuer.as_deref());

        if production && self.dev_mode {
            faults.push("DEV_MODE: refused with ENVIRONMENT=production".to_owned());
        }
        if production && issuer.is_none() {
            faults.push("CLERK_ISSUER: required with ENVIRONMENT=production".to_owned());
        }
        if production && signing_secrets.is_none() {
            faults.push("FILE_SIGNING_SECRET: required with ENVIRONMENT=production".to_owned());
        }
        for (variable, url) in
            [("CLERK_ISSUER", &issuer), ("CLERK_JWKS_URL", &jwks_url), ("PUBLIC_URL", &public_url)]
        {
            if url.as_deref().is_some_and(|url| !is_http_url(url)) {
                faults.push(format!("{variable}: not an http or https URL"));
            }
        }
        for (variable, url) in [("CLERK_ISSUER", &issuer), ("CLERK_JWKS_URL", &jwks_url)] {
            let url = url.as_deref().and_then(|url| Url::parse(url).ok());
            if production && url.is_some_and(|url| !is_encrypted_or_local(&url)) {
                faults.push(format!(
                    "{variable}: keys are not fetched in clear with ENVIRONMENT=production"
                ));
            }
        }
        let parties = present(self.clerk_authorized_parties).map(|list| comma_list(&list));
        let authorized_parties = parties.unwrap_or_default();
        if !authorized_parties.iter().all(|party| is_origin(party)) {
            faults.push(
                "CLERK_AUTHORIZED_PARTIES: origins such as https://app.example.com, comma separated"
                    .to_owned(),
            );
        }
        let otlp_endpoint = self.traces.check(&mut faults);
        let backend = self.backend.check().unwrap_or_else(|found| {
            faults.extend(found);
            None
        });
        let allowed_origins = present(self.allowed_origins).map(|list| comma_list(&list));
        for origin in allowed_origins.iter().flatten() {
            if !is_origin(origin) {
                faults.push(format!(
                    "ALLOWED_ORIGINS: `{origin}` is not an origin such as https://app.example.com"
                ));
            }
        }
        let blobs = BlobStore::parse(&self.blobs).unwrap_or_else(|fault| {
            faults.push(format!("T2M_BLOBS: {fault}"));
            BlobStore::File
        });
        if blobs != BlobStore::File && self.max_upload_bytes > LARGEST_COPY_BYTES {
            faults.push("MAX_UPLOAD_BYTES: S3 copies no more than 5 GiB at once".to_owned());
        }
        let worker_tokens = present(self.worker_tokens).map(|list| comma_list(&list));
        let worker_tokens = worker_tokens.unwrap_or_default();
        if !worker_tokens.iter().all(|token| token.bytes().all(|byte| byte.is_ascii_graphic())) {
            faults.push("T2M_WORKER_TOKENS: each must be of visible ASCII characters".to_owned());
        } else if production && worker_tokens.iter().any(|token| token.len() < SHORTEST_TOKEN) {
            faults.push(format!(
                "T2M_WORKER_TOKENS: each must have {SHORTEST_TOKEN} characters at least with \
                 ENVIRONMENT=production"
            ));
        }
        let mut lifetime = |variable: &str, text: &str| {
            let found = lifetime(text);
            if found.is_none() {
                faults.push(format!("{variable}: not a time such as 30d or 12h"));
            }
            found
        };
        let upload_lifetime = lifetime("UPLOAD_LIFETIME", &self.upload_lifetime);
        let mut kept = |variable: &str, text: &str| match text {
            "never" => None,
            text => lifetime(variable, text),
        };
        let retention = ByTier {
            standard: kept("RETENTION_STANDARD", &self.retention_standard),
            premium: kept("RETENTION_PREMIUM", &self.retention_premium),
        };
        let mut engine = |variable: &str, text: &str| {
            Engine::parse(text).unwrap_or_else(|fault| {
                faults.push(format!("{variable}: {fault}"));
                Engine::None
            })
        };
        let video = engine("T2M_ENGINE", &self.engine);
        let translation_engine = engine("T2M_TRANSLATION_ENGINE", &self.translation_engine);
        if translation_engine == Engine::Storyboard {
            faults.push("T2M_TRANSLATION_ENGINE: the storyboard makes videos only".to_owned());
        }
        let engine_limits = self.engine_limits.check().unwrap_or_else(|found| {
            faults.extend(found);
            EngineLimits::default()
        });
        let callbacks = self.callbacks.check(&mut faults);
        let settings = Settings {
            listen: self.listen,
            data_dir: self.data_dir,
            log: self.log,
            blobs,
            public_url: public_url.map(|url| url.trim_end_matches('/').to_owned()),
            environment: self.environment,
            dev_mode: self.dev_mode,
            issuer: match &token_keys {
                TokenKeys::Development => Some(DEVELOPMENT_ISSUER.to_owned()),
                TokenKeys::Pem(_) | TokenKeys::Jwks(_) => issuer,
            },
            token_keys,
            audience: present(Some(self.clerk_audience)),
            authorized_parties,
            webhook_secrets,
            backend,
            signing_secrets,
            allowed_origins,
            max_upload_bytes: self.max_upload_bytes,
            upload_lifetime: upload_lifetime.unwrap_or_default(),
            quotas: ByTier {
                standard: self.quota_standard_bytes,
                premium: self.quota_premium_bytes,
            },
            retention,
            rate_limit_writes: self.rate_limit_writes,
            rate_limit_reads: self.rate_limit_reads,
            rate_limit_links: self.rate_limit_links,
            rate_limit_anonymous: self.rate_limit_anonymous,
            trusted_proxies: self.trusted_proxies,
            worker_tokens: worker_tokens.into_iter().map(Secret).collect(),
            running_per_user: self.running_per_user,
            streams_per_user: self.streams_per_user,
            stalled_s: self.stalled_s,
            log_format: self.log_format,
            otlp_endpoint,
            engine: video,
            translation_engine,
            engine_limits,
            callbacks,
            master_key: self.master_key.filter(|key| !key.0.trim().is_empty()),
            require_onboarding: self.require_onboarding,
        };
        (settings, faults)
    }
}

fn token_keys(pem: Option<String>, jwks: Option<String>, issuer: Option<&str>) -> TokenKeys {
    match (pem, jwks, issuer) {
        (Some(pem), _, _) => TokenKeys::Pem(pem),
        (None, Some(url), _) => TokenKeys::Jwks(url),
        (None, None, Some(issuer)) => {
            TokenKeys::Jwks(format!("{}/.well-known/jwks.json", issuer.trim_end_matches('/')))
        }
        (None, None, None) => TokenKeys::Development,
    }
}

/// An address, or the name of one, with a port; a port alone is of this machine, which nobody else
/// reaches. An empty variable is an unset one.
fn listen_address(text: &str) -> Result<SocketAddr, String> {
    let text = match text.trim() {
        "" => LISTEN.to_owned(),
        port if port.starts_with(':') => format!("127.0.0.1{port}"),
        text => text.to_owned(),
    };
    let found = text.to_socket_addrs().map(|mut found| found.next());
    found.ok().flatten().ok_or_else(|| "expected ADDRESS:PORT".to_owned())
}

/// An empty variable is an unset one.
fn present(value: Option<String>) -> Option<String> {
    value.filter(|text| !text.trim().is_empty())
}

/// A second at least, a century at most: then no sum of it and a date overflows.
fn lifetime(text: &str) -> Option<TimeDelta> {
    let parsed = humantime::parse_duration(text.trim()).ok()?;
    let found = TimeDelta::from_std(parsed).ok()?;
    (TimeDelta::seconds(1)..=TimeDelta::days(36_525)).contains(&found).then_some(found)
}

fn comma_list(list: &str) -> Vec<String> {
    list.split(',').map(str::trim).filter(|item| !item.is_empty()).map(str::to_owned).collect()
}

/// Neither a user nor a fragment: nobody means them in a setting.
fn is_http_url(text: &str) -> bool {
    url::Url::parse(text).is_ok_and(|url| {
        matches!(url.scheme(), "http" | "https")
            && url.host().is_some()
            && url.username().is_empty()
            && url.password().is_none()
            && url.fragment().is_none()
    })
}

/// Spelled as browsers spell it, so that an exact comparison can succeed: no path, no user, lower
/// case, punycode, and no port that the scheme implies.
fn is_origin(text: &str) -> bool {
    is_http_url(text)
        && url::Url::parse(text).is_ok_and(|url| url.origin().ascii_serialization() == text)
}

#[cfg(test)]
mod tests;
